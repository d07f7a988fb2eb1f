"""What the documentation site needs beyond Markdown files: generated pages, pictures from elsewhere, formulas.

mkdocs calls the functions named on_*. Pages that repeat something else in the repository are made here and not by
hand: the API reference (one page per room of rdlm), the presets, the tutorials (examples/*.py), contributing and
changelog.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RESULTS = "experiments/studies/results"
sys.path.insert(0, str(ROOT))

import rdlm  # noqa: E402
from rdlm.config import PRESETS  # noqa: E402
from rdlm.perf.flops import parameters  # noqa: E402


def on_config(config: MkDocsConfig) -> None:
    """Fill in the two lists of pages that follow from the repository."""
    for section in config.nav or []:
        if "Tutorials" in section:
            section["Tutorials"] = [f"tutorials/{path.stem}.md" for path in tutorials()]
        if "Reference" in section:
            section["Reference"][0] = {"API": ["api/index.md", *(f"api/{room}.md" for room in rooms())]}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages and the pictures of the studies."""
    pages = {
        "presets.md": "\n".join(presets()),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text() if (ROOT / "CHANGELOG.md").exists() else "# Changelog\n",
        "api/index.md": reference("rdlm"),
        **{f"api/{room}.md": reference(f"rdlm.{room}") for room in rooms()},
        **{f"tutorials/{path.stem}.md": as_markdown(path.read_text()) for path in tutorials()},
    }
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    for picture in (ROOT / RESULTS).glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that are right in the repository become links that are right in the site."""
    markdown = markdown.replace(f"](../../{RESULTS}/", "](../results/")  # in docs/studies/
    return markdown.replace("](docs/", "](")  # in CONTRIBUTING.md and CHANGELOG.md


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """LaTeX becomes MathML, which browsers draw without a script."""
    unescape = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}

    def mathml(match: re.Match[str]) -> str:
        latex = re.sub("&(lt|gt|amp);", lambda entity: unescape[entity[0]], match[2])
        if match[1] == "span":
            return convert(latex)
        rows = latex.replace("{aligned}", "{align*}")  # the name that the converter knows
        return f'<div class="formula">{convert(rows, display="block")}</div>'

    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', mathml, html, flags=re.DOTALL)


def reference(name: str) -> str:
    """The API page of rdlm, or of one of its rooms: the classes and functions in `__all__`, or all of a file."""
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        return f"# {name}\n\n::: {name}\n"
    page, elsewhere = [f"# {name}\n", f"::: {name}\n    options: {{members: false}}\n"], []
    for public in module.__all__:
        found = getattr(module, public)
        if not getattr(found, "__module__", "").startswith("rdlm."):
            continue  # a room, or a constant
        if name != "rdlm" and getattr(rdlm, public, None) is found:
            elsewhere.append(f"[`{public}`][{found.__module__}.{found.__qualname__}]")
            continue
        options = f"{{heading: {public}, show_root_heading: true, show_root_toc_entry: true}}"
        page.append(f"::: {found.__module__}.{found.__qualname__}\n    options: {options}\n")
    if elsewhere:
        page.insert(2, f"On the page of [rdlm](index.md): {', '.join(elsewhere)}.\n")
    return "\n".join(page)


def rooms() -> Iterable[str]:
    """The rooms of rdlm: every file or folder in it that is importable."""
    found = {path.stem for path in (ROOT / "rdlm").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    return sorted(found - {"__init__"})


def tutorials() -> list[Path]:
    """The tutorials in reading order."""
    return sorted((ROOT / "examples").glob("*.py"))


def as_markdown(percent: str) -> str:
    """A notebook kept as text (jupytext's percent format) as a page."""
    parts = []
    for cell in re.split(r"^# %%", percent, flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            parts.append(re.sub("^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def presets() -> Iterator[str]:
    """The page about presets, from rdlm/config/presets.py."""
    yield "# Presets\n"
    yield "A preset is a whole configuration with a name. `python experiments/train.py PRESET --help` lists its fields,"
    yield "and every field is an option. These tables are made from `rdlm/config/presets.py`.\n"
    yield "| preset | parameters | layers | width | heads | MLP | vocabulary | mean r | k |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, run in PRESETS.items():
        m = run.model
        layers, heads = f"{m.prelude_layers}/{m.core_layers}/{m.coda_layers}", f"{m.num_heads} x {m.head_dim}"
        row: list[Any] = [f"`{name}`", f"{parameters(m):,}", layers, m.embed_dim, heads, m.mlp_dim]
        yield table_row(*row, f"{m.vocab_size:,}", m.mean_recurrence, m.backprop_depth)
    yield "\nLayers are those of prelude, core and coda; k is the largest number of recurrences with gradient.\n"
    yield "| preset | steps | batch | length | optimizer | learning rate | warm-up, cooldown | remat |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, run in PRESETS.items():
        o = run.optimizer
        ramps = f"{o.warmup_steps:,}, {o.cooldown_steps:,}"
        sizes = [f"{run.steps:,}", f"{run.data.batch_size:,}", f"{run.data.sequence_length:,}"]
        yield table_row(f"`{name}`", *sizes, o.name, f"{o.learning_rate:g}", ramps, run.recurrence.remat)
    yield """
`quickstart` is what `make quickstart` trains; `quickstart_twin` is its fixed-depth baseline, with the same parameters
and the same data order. `nano` is for tests. `small` fits one TPU host. `huginn_3p5b` has the exact shape of the
published model. `huginn_tpu` is about as large, with heads of 128 and widths that divide by 256, so that matrices fill
the tiles of a TPU and heads can be split over chips."""


def table_row(*cells: Any) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"
