"""A page that needs nothing but a browser: the bundle of `app.tsx`, and the data it draws.

Belongs here: fetching Grafana's components from npm, bundling them, the HTML around it. Does not: the data
(`answers.py`).
"""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scaling.errors import UserError

HERE = Path(__file__).parent
TOOLS = HERE.parents[1] / "var" / "tools" / "preview"
INSTALL_SECONDS = 600
BUNDLE_SECONDS = 120
TEMPLATES = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def bundle() -> tuple[str, str]:
    """Make one script of the application and of Grafana's components.

    Returns:
        The script and the style sheet.

    Raises:
        UserError: there is no npm, or it cannot install or bundle.
    """
    if shutil.which("npm") is None:
        raise UserError("npm is not on the PATH; the preview is drawn with Grafana's components, which come from there")
    TOOLS.mkdir(parents=True, exist_ok=True)
    for source in (HERE / "package.json", *HERE.glob("*.ts*")):
        shutil.copy(source, TOOLS / source.name)
    wanted, installed = TOOLS / "package.json", TOOLS / "installed.json"
    if not installed.exists() or installed.read_text() != wanted.read_text():
        _run(["npm", "install", "--silent", "--ignore-scripts", "--no-package-lock", "--no-audit"], INSTALL_SECONDS)
        shutil.copy(wanted, installed)
    _run(
        [
            *(str(TOOLS / "node_modules" / ".bin" / "esbuild"), "app.tsx", "--bundle", "--minify", "--outfile=app.js"),
            *("--jsx=automatic", "--loader:.woff2=dataurl", "--loader:.woff=empty", "--loader:.svg=text"),
            *("--loader:.ttf=empty", '--define:process.env.NODE_ENV="production"', "--define:global=window"),
            *("--alias:react-custom-scrollbars-2=./scrollbars.ts", "--log-level=error", "--legal-comments=eof"),
        ],
        BUNDLE_SECONDS,
    )
    return (TOOLS / "app.js").read_text(), (TOOLS / "app.css").read_text()


def _run(command: list[str], seconds: float) -> None:
    try:
        done = subprocess.run(command, cwd=TOOLS, capture_output=True, text=True, timeout=seconds, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise UserError(f"{Path(command[0]).name} took longer than {seconds:g} s") from None
    if done.returncode:
        raise UserError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[:2000]}")


def html(page: Mapping[str, Any], script: str, css: str) -> str:
    """One dashboard.

    Args:
        page: what is drawn.
        script: of the application.
        css: of the application.
    """
    # Either of the two would end the element that holds them, also within a string.
    quoted = script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return TEMPLATES.get_template("page.html.j2").render(page=page, script=quoted, css=css)


def index(pages: Mapping[str, Mapping[str, Any]], note: str) -> str:
    """Links to all of them.

    Args:
        pages: by uid.
        note: about where the data is from.
    """
    return TEMPLATES.get_template("index.html.j2").render(pages=pages, note=note)
