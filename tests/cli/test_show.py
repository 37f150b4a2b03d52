"""`surgeon show`: numbers against direct computation, the diff, and a page that needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from surgeon import fold, passes, run, store
from surgeon.cli import show
from surgeon.cli.main import main
from surgeon.passes.lora import Lora
from surgeon.passes.vera import Vera
from surgeon.source import open_graph, open_source

PATH = "model.layers.1.self_attn.q_proj"


class Trained:
    """A value in place of the first one."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def __call__(self) -> torch.Tensor:
        return self.value


@pytest.fixture(scope="module")
def work(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    torch.manual_seed(0)
    base = open_graph(open_source(tiny_llama))
    graph = run.apply(base, Lora(rank=4), Vera(rank=8, targets="up_proj"))
    for name, read in list(graph.inserted.items()):
        if name.endswith(("lora.b", "vera.b")):
            graph.inserted[name] = Trained(torch.randn_like(read()) * 0.1)
    return store.save(graph, folder / "work")


def test_json(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(work), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["site_count"] == len(found["sites"]) == 6
    assert found["methods"] == ["lora(rank=4)", "vera(targets='up_proj', rank=8)"]
    site = next(site for site in found["sites"] if site["path"] == PATH)
    assert (site["shape"], site["methods"], site["rank"], site["parameters"]) == ([32, 32], ["lora"], 4, 256)
    assert found["files"]["surgery.json"] > 0
    assert "+  %self_attn.q_proj/linear.1" in found["diff"]


def test_the_change_is_the_norm_of_what_is_added(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(work), "--json"]) == 0
    sites = {site["path"]: site for site in json.loads(capsys.readouterr().out)["sites"]}
    graph = store.load(work)
    a, b = (graph.inserted[f"{PATH}.lora.{name}"]() for name in "ab")
    expected = (b @ a * 4).norm() / graph.values[f"{PATH}.weight"].norm()
    assert sites[PATH]["change"] == pytest.approx(expected.item(), rel=1e-5)
    up = "model.layers.0.mlp.up_proj"
    low, high = graph.inserted["vera.A"](), graph.inserted["vera.B"]()
    d, gain = (graph.inserted[f"{up}.vera.{name}"]() for name in "db")
    expected = (gain[:, None] * (high @ (d[:, None] * low))).norm() / graph.values[f"{up}.weight"].norm()
    assert sites[up]["change"] == pytest.approx(expected.item(), rel=1e-5)


def test_table_and_diff(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(work)]) == 0
    assert PATH in capsys.readouterr().err
    assert main(["show", str(work), "--diff"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["--- before", "+++ after"]
    assert any(line.startswith("+") and "vera.d" in line for line in lines)
    assert "\033" not in "".join(lines)


class Page(HTMLParser):
    """Tags that must close, and everything a page could load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.drawn = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe"):
            self.loaded.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        self.drawn += ("class", "block matrix new") in attrs

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main(["show", str(work), "--html", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["html"] == str(out)
    html = out.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.loaded == []
    assert not re.search(r"https?://|@import|url\(", html)
    assert page.drawn == 2 * 2 + 2  # a and b at q and v, A and B at up
    assert html.count("<svg") == 2
    assert "prefers-color-scheme: dark" in html
    assert "&lt;" not in html.split("<h2>What changed")[0]
    for path in (PATH, "model.layers.0.mlp.up_proj", "README.md"):
        assert path in html


def test_ranks_that_differ_are_a_map(tiny_llama: Path, tmp_path: Path) -> None:
    folder, page = tmp_path / "ranks", tmp_path / "page.html"
    given = ["--rank", "4", "--ranks", "model.layers.1.*=0", "--targets", "q_proj,up_proj"]
    assert main(["apply", str(tiny_llama), "--method", "adalora", *given, "-o", str(folder)]) == 0
    assert main(["show", str(folder), "--html", str(page)]) == 0
    _, _, rest = page.read_text(encoding="utf-8").partition("Where the rank went")
    assert 'title="model.layers.0.mlp.up_proj: rank 4">4</i>' in rest
    assert 'title="model.layers.1.self_attn.q_proj: rank 0">0</i>' in rest
    Page().feed(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def virtual(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = open_graph(open_source(tiny_llama))
    graph = run.apply(base, passes.make("prompt", tokens=4), passes.make("prefix", tokens=3, hidden=5))
    return store.save(graph, tmp_path_factory.mktemp("virtual") / "work")


def test_virtual_tokens_have_sizes_and_lengths(
    virtual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["show", str(virtual), "--html", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sites"], found["site_count"]) == ([], 3)
    rows, first, _ = found["virtual"]
    assert (rows["path"], rows["tokens"], rows["shape"], rows["numbers"]) == ("model.embed_tokens", 4, [32], 128)
    assert (first["method"], first["tokens"], first["shape"], first["numbers"]) == ("prefix", 3, [2, 8], 96)
    graph = store.load(virtual)
    lengths = graph.values["model.embed_tokens.weight"].norm(dim=1).mean()
    assert rows["beside"] == pytest.approx(float(lengths), rel=1e-4)
    column = fold.columns(graph)[0].columns()
    assert first["norm"] == pytest.approx(float(column.k.transpose(0, 1).flatten(1).norm(dim=1).mean()), rel=1e-4)
    assert main(["show", str(virtual)]) == 0
    assert "3 × 2 × 8" in capsys.readouterr().err
    html = page.read_text(encoding="utf-8")
    assert "Virtual tokens" in html
    assert "How far the weights moved" not in html
    assert "model.layers.1.self_attn" in html


def test_a_plain_checkpoint_has_nothing_to_show(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tiny_llama)]) == 2
    assert "no method is applied" in capsys.readouterr().err


def test_a_page_needs_its_folder(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(work), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_long_options_are_brief() -> None:
    pairs = ", ".join(f"('model.layers.{{0,{i}}}.q_proj', {i})" for i in range(9))
    assert show.brief(f"adalora(rank=6, ranks=({pairs}), target_rank=4)") == "adalora(rank=6, ranks=…, target_rank=4)"
    assert show.brief("lora(ranks=(('q_proj', 4),))") == "lora(ranks=(('q_proj', 4),))"


def test_the_page_counts_no_training_checkpoints(work: Path, tmp_path: Path) -> None:
    import shutil

    place = shutil.copytree(work, tmp_path / "work")
    pages = []
    for extra in ("", "checkpoint-4"):
        if extra:
            (place / extra).mkdir()
            (place / extra / "state.safetensors").write_bytes(bytes(5_000_000))
        assert main(["show", str(place), "--html", str(tmp_path / "page.html")]) == 0
        pages.append(re.findall(r"<b>[^<]*</b><span>adapter on disk", (tmp_path / "page.html").read_text()))
    assert pages[0] == pages[1] != []
