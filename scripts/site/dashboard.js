// Fills every element with data-dashboard: one page, one kind.
import { make } from "./common.js";
import { densities } from "./densities.js";
import { evaluation, fidelity, training } from "./tables.js";

const kinds = { densities, evaluation, fidelity, training };

for (const element of document.querySelectorAll("[data-dashboard]")) {
  element.replaceChildren(make("p", { role: "status" }, "Loading …"));
  kinds[element.dataset.dashboard](element).then(() => element.setAttribute("data-ready", ""), (fault) => {
    element.replaceChildren(make("p", { role: "alert" }, `This needs the site's data files, over HTTP: try make serve. (${fault.message})`));
    console.error(fault);
  });
}
