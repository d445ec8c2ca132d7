"""What goes wrong in a browser, and what a checker of accessibility finds."""

import shutil
from pathlib import Path

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


def watched(context, faults: list):
    "A tab; what goes wrong in it is added to `faults`."
    page = context.new_page()
    page.on("console", lambda message: faults.append(f"{page.url}: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(f"{page.url}: {error}"))
    page.on("response", lambda answer: faults.append(f"{page.url}: {answer.status} {answer.url}") if answer.status >= 400 else None)
    # Chromium gives up the icon of a page that is left at once; a server that does not answer is another error.
    page.on("requestfailed", lambda request: faults.append(f"{page.url}: {request.failure} {request.url}")
            if request.failure != "net::ERR_ABORTED" else None)
    return page


def serious(page) -> list[str]:
    "Serious faults that axe finds on a page."
    import axe_playwright_python
    page.add_script_tag(path=str(Path(axe_playwright_python.__file__).parent / "axe.min.js"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations'], runOnly: ['wcag2a', 'wcag2aa']})")["violations"]
    return [f"{fault['id']}: {node['target']} {node['any'][0]['message'] if node['any'] else ''}" for fault in found
            if fault["impact"] in ("serious", "critical") for node in fault["nodes"][:3]]
