import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest
from report_pages import measured

from safeshard.manifests import Fallback, Input, Manifest, Method, ModuleEntry, TensorEntry, printable
from safeshard.manifests.report import page
from safeshard.manifests.schema import Caution

Reader = Callable[[str], Any]
EVIL = [
    '"><script>alert(1)</script>',
    "' onmouseover='alert(1)",
    '" onfocus="alert(1)" autofocus="',
    "</style></title></svg><img src=x onerror=alert(1)>",
    "<!-- ",
    "]]><svg/onload=alert(1)>",
    "&lt;b&gt;&quot;",
    "\x1b[31m\u202e\n\t\x00",
    "javascript:alert(1)",
    "https://evil/?a=<b>",
]


def named(example: Manifest, name: str) -> Manifest:
    """The example with `name` wherever a file's author may write."""
    modules = (name, f"{name}/0", f"layers.1.{name}", f"layers.2.experts.3.{name}", f"{name}.0.q")
    return example.model_copy(
        update={
            "tool": example.tool.model_copy(update={"safeshard": name, "torch": name, "device": name}),
            "method": Method(name=name, paper=name, options={name: name, "nested": {name: [name]}}),
            "inputs": {name: Input(source=name, revision=name, files=())},
            "modules": tuple(ModuleEntry(name=n, decision="merged", cosine=0.5, note=name) for n in modules),
            "tensors": (
                TensorEntry(name=name, file=name, dtype=name, shape=(1,), action="new", blake3="0" * 64, source=name),
            ),
            "fallbacks": (Fallback(asked=name, done=name, why=name, subject=name),),
            "run": example.run.model_copy(update={"seconds": {name: 1.0}}),
            "warnings": (Caution(kind=name, text=name, remedy=name),),
        }
    ).sealed()


@pytest.mark.parametrize("evil", EVIL)
def test_no_element_and_no_attribute_comes_from_a_name(example: Manifest, read: Reader, evil: str) -> None:
    texts = []
    for name in (evil, "plain"):
        manifest = named(example, name)
        texts.append(page([(name, manifest), ("other", example)], [measured(manifest, name)]))
    text = texts[0]
    hostile, plain = map(read, texts)
    assert hostile.shape == plain.shape
    assert {a["href"] for a, _ in hostile.named("a")} == {"#content", "#output-1", "#output-2", example.method.paper}
    styled = [a.get("class") for _, a, _ in hostile.elements]
    assert styled == [a.get("class") for _, a, _ in plain.elements]
    assert text.replace("\n", "").isprintable()
    for tag, count in {"h2": 1, "h4": 1, "b": 1, "td": 14, "th": 8, "option": 2, "figcaption": 0}.items():
        assert sum(printable(evil) in shown for _, shown in hostile.named(tag)) >= count


def test_it_refers_to_nothing_outside_and_holds_no_script(example: Manifest, read: Reader) -> None:
    text = page([("out", example)])
    found = read(text)
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    names = {name for name, _, _ in found.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image", "audio"}
    attributes = {key for _, given, _ in found.elements for key in given}
    assert not attributes & {"src", "srcset", "style", "background", "xlink:href", "action"}
    assert not [key for key in attributes if key.startswith("on")]
    assert {name for name, given, _ in found.elements if "href" in given} == {"a"}
    [(_, style)] = found.named("style")
    assert "url(" not in style
    assert "@import" not in style
    policies = [a["content"] for a, _ in found.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_templates_mark_nothing_as_safe_and_quote_every_attribute() -> None:
    templates = [f.read_text() for f in files("safeshard.manifests.report").joinpath("templates").iterdir()
                 if f.name.endswith(".html")]  # fmt: skip
    assert len(templates) == 5
    for text in templates:
        assert "safe" not in re.sub(r"[^{%]*({[{%].*?[}%]})[^{%]*", r"\1", text).replace(
            "output.manifest.tool.safeshard", ""
        )
        assert not re.search(r"=\{\{|autoescape|script|javascript", text)


def test_what_the_manifest_says_is_there(example: Manifest, read: Reader) -> None:
    found = read(page([("out", example.sealed())]))
    cells = [text for _, text in found.named("td")]
    nodes = " ".join(text for a, text in found.named("li") if a.get("class") == "node")
    for expected in ("aligned hf://org/chat@0123abc", "model.safetensors, 4.10 kB header 1111111111111111",
                     "adapter adapter", "adapter_config.json, 512 B BLAKE3 2222222222222222"):  # fmt: skip
        assert expected in " ".join(nodes.split())
    for expected in (
        "no CUDA device",
        "0.35",
        "[0.8, 0.2]",
        "3.90 GB",
        "4.52 kB",
        "16 x 64",
    ):
        assert expected in cells
    assert "/home/someone" not in nodes + "".join(cells)
    assert "the delta is zero" in cells
    assert [text for _, text in found.named("dd")] == ["3 of 7", "0.331", "0.35", "1 ~", "1", "3.5 s", "700.00 MB"]
    assert "edited after it was written" not in cells


def test_an_edited_manifest_is_called_so(example: Manifest, read: Reader) -> None:
    edited = example.sealed().model_copy(update={"fallbacks": ()})
    assert "edited after it was written" in [text for _, text in read(page([("out", edited)])).named("td")]


@pytest.mark.parametrize("count", [0, 2, 3])
def test_several_outputs_have_a_row_each(example: Manifest, read: Reader, count: int) -> None:
    found = read(page([(f"out/{i}", example) for i in range(count)]))
    targets = [a["href"] for a, text in found.named("a") if re.match(r"\d+ out/", text)]
    sections = [a["id"] for a, _ in found.named("section") if "id" in a]
    assert targets == [f"#{anchor}" for anchor in sections]
    assert len(sections) == count
    assert [text for _, text in found.named("h1")] == [f"safeshard report: {count} outputs"]


@pytest.mark.parametrize("empty", ["modules", "tensors", "fallbacks", "inputs"])
def test_nothing_to_show_is_no_error(example: Manifest, read: Reader, empty: str) -> None:
    manifest = example.model_copy(update={empty: type(getattr(example, empty))()})
    assert read(page([("out", manifest)])).named("section")


def test_figures_beyond_all_bounds_are_no_error(example: Manifest, read: Reader) -> None:
    wild = [1e308, -1e308, 5e-324, 0.0, 1.0]
    modules = tuple(
        ModuleEntry(name=f"layers.{i}.q", decision="kept", cosine=w, threshold=w, budget=w) for i, w in enumerate(wild)
    )
    run = example.run.model_copy(update={"wall_s": -1e308, "seconds": {"a": 1e308, "b": -1e308, "c": 5e-324}})
    found = read(page([("out", example.model_copy(update={"modules": modules, "run": run}))]))
    for attributes, _ in found.named("rect"):
        assert all(re.fullmatch(r"-?\d+(\.\d+)?", attributes[key]) for key in ("width", "height"))


@pytest.mark.parametrize("name", ["layers.{}.kind_{}", "layers.{}.q", "stack_{}.0.kind_{}"])
def test_a_page_is_bounded(example: Manifest, read: Reader, name: str) -> None:
    count = 21_000
    modules = tuple(ModuleEntry(name=name.format(i, i), decision="merged", cosine=0.1) for i in range(count))
    tensor = example.tensors[0]
    many = example.model_copy(
        update={
            "modules": modules,
            "tensors": (tensor,) * count,
            "fallbacks": example.fallbacks * count,
            "inputs": {str(i): example.inputs["adapter"] for i in range(count)},
            "method": example.method.model_copy(update={"options": {str(i): i for i in range(count)}}),
            "run": example.run.model_copy(update={"seconds": {str(i): 1.0 for i in range(count)}}),
        }
    )
    text = page([("out", many)])
    assert len(text) < 4_000_000
    assert text.count(f"and {count - 1000} more, in manifest.json") >= 4
    assert f"and {count - 40} more, in manifest.json" in text  # inputs
