"""Settings: the environment wins, strangers' files are left alone, and the published data sets have their published shape."""

import pytest

from tomat.io.remote import TomatError
from tomat.io.settings import data_set, labels, setting, settings_file

PUBLISHED = {"val-smoke": ("validation", 128, 32), "val-full": ("validation", 4305, 32),
             "val-full-m128": ("validation", 4305, 128), "train-full": ("train", 77498, 32)}


@pytest.mark.parametrize("label", PUBLISHED)
def test_published_labels(label):
    named = data_set(label)
    assert (named.split, named.materials, named.patches) == PUBLISHED[label]
    assert (named.density_codec, named.layout) == ("two_token_9_12", "anchored")
    assert (named.patch_size, named.pad_to, named.seed) == (14, 8192, 42)
    assert (named.log_min, named.log_max) == (-4.13, 4.97)


def test_the_environment_wins(monkeypatch):
    assert setting("modal_app") == "tomat" and setting("token_store", "here") == "here"
    monkeypatch.setenv("TOMAT_TOKEN_STORE", "s3://there")
    assert setting("token_store", "here") == "s3://there"


def test_a_strangers_settings_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    monkeypatch.chdir(tmp_path)
    assert settings_file() != tmp_path / "settings.ini" and "val-smoke" in labels()
    (tmp_path / "settings.ini").write_text("[data]\npatch_size = 3\n")
    assert settings_file() == tmp_path / "settings.ini" and labels() == []
    with pytest.raises(TomatError, match="names none"):
        data_set("val-smoke")


@pytest.mark.parametrize("text, words", [("nonsense", "cannot be read"), ("[data]\n[data.x]\nsplit = train\n", "materials"),
                                         ("[data.x]\nsplit = train\n", "'data' is missing"),
                                         ("[data]\n[data.x]\nmaterials = many\n", "many")])
def test_bad_settings_are_one_sentence(tmp_path, monkeypatch, text, words):
    (tmp_path / "mine.ini").write_text(text)
    monkeypatch.setenv("TOMAT_SETTINGS", str(tmp_path / "mine.ini"))
    with pytest.raises(TomatError, match=words):
        data_set("x")
    monkeypatch.setenv("TOMAT_SETTINGS", str(tmp_path / "none.ini"))
    with pytest.raises(TomatError, match="does not exist"):
        setting("token_store")
