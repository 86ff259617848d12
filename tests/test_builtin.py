"""Built-in models and data: their tokenizers, their cache, and who has a model trained."""

from __future__ import annotations

import pytest

from launch import builtin, doctor
from launch.builtin import SPECIAL, TASKS, make_tokenizer, resolve
from shared.errors import InputError
from tests.fakes import make_config, write_config

CHARACTERS = "".join(map(chr, [*range(0x250), 0x7FF, 0x800, *range(0x1000, 0xD000, 0x1000), 0xFFFD, 0x10000, 0x10FFFF]))


@pytest.mark.parametrize("task", TASKS)
def test_every_symbol_and_every_special_token_has_an_id_of_its_own(task):
    vocabulary = make_tokenizer(TASKS[task]).get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(vocabulary) == len(SPECIAL) + len(TASKS[task].alphabet or range(256))
    assert [vocabulary[token] for token in SPECIAL] == list(range(len(SPECIAL)))


@pytest.mark.parametrize(
    "text", ["à la carte", "\x9d\x9e\x9f\xa0\xad", CHARACTERS, *SPECIAL, f"{SPECIAL[3]}à{SPECIAL[4]}"]
)
def test_a_text_of_bytes_and_special_tokens_comes_back(text):
    tokenizer = make_tokenizer(TASKS["gsm8k"])
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    plain = text
    for token in SPECIAL:
        plain = plain.replace(token, "")
    assert sum(i < len(SPECIAL) for i in ids) == sum(text.count(token) for token in SPECIAL)
    assert sum(i >= len(SPECIAL) for i in ids) == len(plain.encode())


@pytest.mark.parametrize(
    ("variables", "folder", "found"),
    [
        ({"MILLRACE_CACHE": "/proc/none/cache"}, "/proc/none/cache", "No such file or directory: '/proc/none"),
        ({"HOME": "/proc"}, "/proc/.cache/millrace", "No such file or directory: '/proc/.cache"),
        ({"MILLRACE_CACHE": "", "HOME": "/proc"}, "/proc/.cache/millrace", "No such file"),
        ({"MILLRACE_CACHE": "~nobody-of-that-name/x"}, "~nobody-of-that-name/x", "no home folder"),
    ],
)
def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, variables, folder, found):
    monkeypatch.delenv("MILLRACE_CACHE")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for changes in ({"data.train": "builtin:addition"}, {"model.path": "builtin:addition"}):
        with pytest.raises(InputError) as caught:
            resolve(make_config(**changes), "run.toml")
        assert (caught.value.code, caught.value.place) == ("E601", folder)
        assert found in caught.value.found
        assert caught.value.fix.startswith("MILLRACE_CACHE=")


def test_a_cache_that_has_everything_serves_where_nothing_may_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path))
    config = make_config(**{"data.train": "builtin:addition"})
    made = resolve(config, "run.toml").data.train[0].path
    monkeypatch.setattr(builtin, "_check_writable", lambda folder: pytest.fail(f"{folder} is to be written"))
    assert resolve(config, "run.toml").data.train[0].path == made


def test_two_checkouts_in_one_home_make_their_models_once_each(monkeypatch, tmp_path):
    made = []
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "_make_model", lambda task, name, part: made.append(part) or part.mkdir())
    config = make_config(**{"model.path": "builtin:addition"})
    for source in ("one", "the other", "one", "the other"):
        monkeypatch.setattr(builtin.inspect, "getsource", lambda _, source=source: source)
        resolve(config, "run.toml")
    assert len(made) == 2


@pytest.mark.parametrize(("options", "trained"), [([], False), (["--sample", "1"], True)])
def test_the_doctor_has_a_model_trained_only_to_sample_from_it(monkeypatch, tmp_path, options, trained):
    asked = []

    def prepared(*_, rehearsal, **__):
        asked.append(rehearsal)
        raise InputError("E401", "enough seen", "", "", "", "")

    monkeypatch.setattr("launch.preflight.prepare", prepared)
    assert doctor.main([str(write_config(tmp_path / "run.toml")), *options]) == 2
    assert asked == [not trained]


@pytest.mark.process
def test_the_doctor_of_a_built_in_model_takes_it_untrained(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "_make_model", lambda *_: pytest.fail("the model was trained"))
    assert doctor.main(["gsm8k_cpu", "--run.output_dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert "advice" in shown.out
    assert "shards" not in shown.err, "a progress bar of a library"
    assert not (tmp_path / "run").exists()
