"Every composition is in exactly one class, and well-known compounds are where a chemist looks for them."

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Composition, Element, Lattice, Structure

from tomat.density.classify import CHALCOGENS, CLASSES, HALOGENS, METALS, class_of, classify
from tomat.io.remote import TomatError
from tomat.density.store import sample_store

SYMBOLS = sorted({element.symbol for element in Element})
symbols = st.one_of(st.sampled_from(SYMBOLS), st.sampled_from(["O", "F", "Cl", "S", "Te", "Fe", "Na", "Si", "H"]))

KNOWN = {
    "intermetallic": "Li Fe Au Hg Bi Ni3Al NaPb Nb3Sn CuZn UPt3 SmCo5 Mg2Pb InBi",
    "halide": "NaCl CaF2 CsPbI3 SF6 UF6 ICl HF NH4Cl BiSI BrF5 OF2 CCl4 LaHBr2",
    "oxyhalide": "BiOCl LaOF SOCl2 KClO4 FeOCl COF2 LaSOF BOF HClO",
    "chalcogenide": "ZnS PbTe FeS2 MoS2 Bi2Te3 CuInSe2 H2S CS2 SeS2 Sb2S3",
    "oxychalcogenide": "La2O2S Na2SO4 BiCuSeO CaSO4 COS H2SO4 Na2S2O3",
    "oxide": "MgO Fe2O3 TeO2 SO3 I2O5 Cl2O7 NaOH CaCO3 KNO3 H2O SrTiO3 SiO2 YBa2Cu3O7 AlPO4 Xe2O6 SeTeO4",
    "other": "Si C B As O2 F2 I2 S8 Se Te N2 He GaAs InSb SiC TiC GaN LiH MgB2 YSi Fe3P PdH Mg3N2 CH4",
}


@pytest.mark.parametrize("name, formula", [(name, formula) for name, formulas in KNOWN.items() for formula in formulas.split()])
def test_well_known_compounds(name, formula):
    assert classify(formula) == classify(Composition(formula)) == name


@settings(derandomize=True, deadline=None, max_examples=500)
@given(elements=st.sets(symbols, min_size=1, max_size=6))
def test_exactly_one_class_by_the_table(elements):
    "The ten lines of the table, each as a condition of its own: the first that fits is what the function says."
    halogens, chalcogens, oxygen = elements & HALOGENS, elements & CHALCOGENS, "O" in elements
    table = [(elements <= METALS, "intermetallic"), (len(elements) == 1, "other"),
             (oxygen and halogens and elements - halogens - {"O"}, "oxyhalide"),
             (oxygen and "F" in elements, "halide"), (oxygen and halogens, "oxide"),
             (oxygen and chalcogens and elements - chalcogens - {"O"}, "oxychalcogenide"),
             (oxygen, "oxide"), (halogens, "halide"), (chalcogens, "chalcogenide"), (True, "other")]
    found = class_of(elements)
    assert found in CLASSES and found == next(name for fits, name in table if fits)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(amounts=st.dictionaries(symbols, st.integers(1, 9), min_size=1, max_size=5), data=st.data())
def test_neither_amounts_nor_order_matter(amounts, data):
    names = data.draw(st.permutations(list(amounts)))
    structure = Structure(Lattice.cubic(9), names, [[i / 9] * 3 for i in range(len(names))])
    assert classify(structure) == classify(Composition(amounts)) == class_of(names)


def test_the_groups_do_not_overlap():
    groups = [HALOGENS, CHALCOGENS, METALS, {"O"}]
    assert sum(map(len, groups)) == len(set().union(*groups)) and set().union(*groups) <= set(SYMBOLS)


def test_charges_isotopes_and_shared_sites():
    salt = Structure(Lattice.cubic(5.6), ["Na+", "Cl-"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert classify(salt) == "halide"
    shared = Structure(Lattice.cubic(4), [{"Fe": 0.5, "Ni": 0.5}, {"O": 0.5, "F": 0.5}], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert classify(shared) == "oxyhalide"
    assert classify("D2O") == "oxide" and classify("LiD") == "other"


@pytest.mark.parametrize("formula", ["", "Xx2", "rust?", "2", "Fe2O3!"])
def test_what_is_no_formula(formula):
    with pytest.raises(TomatError, match="such as Fe2O3") as caught:
        classify(formula)
    assert "\n" not in str(caught.value)


def test_the_sample():
    "By their elements alone, which is what a chemist would look at."
    store = sample_store()
    for structure in (store.read(id).structure for id in store.ids):
        symbols = {element.symbol for element in structure.composition}
        kinds = {"halide": symbols & HALOGENS, "chalcogenide": symbols & CHALCOGENS, "oxide": symbols & {"O"}}
        expected = next((kind for kind, found in kinds.items() if found), "intermetallic" if symbols <= METALS else "other")
        assert classify(structure) == expected, structure.formula
