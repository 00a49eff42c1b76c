"""Code of a user's own: found beside the configuration or installed, and told what is wrong with it."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rapo.config import RunConfig, load_config, to_toml
from megatron_rapo.errors import RapoError
from megatron_rapo.user_code import in_order, is_named_in, load, place_of

MINIMAL = """
[run]
directory = "runs/x"
steps = 3

[model]
path = "model"

[data]
source = "arithmetic"

[rollout]
prompts_per_step = 4
max_response_tokens = 8
"""


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes modules of the user's; what was imported of them is forgotten afterwards."""
    path = list(sys.path)

    def write(**modules: str) -> Path:
        for name, text in modules.items():
            file = tmp_path / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        return tmp_path

    yield write
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def refusal(address: str, *folders: Path) -> str:
    with pytest.raises(RapoError) as caught:
        load(address, folders, "reward.function")
    text = str(caught.value)
    assert text.startswith(f'reward.function = "{address}"')
    return text


def test_a_module_of_the_folder_is_found_with_its_neighbours(write: Callable[..., Path]) -> None:
    folder = write(mine_a="import mine_b\ndef score(): return mine_b.VALUE", mine_b="VALUE = 7")
    assert load("mine_a:score", [folder], "reward.function")() == 7


def test_a_package_and_a_later_folder_are_found(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = write(mine_pkg__scores="def score(): return 3")
    (tmp_path / "empty").mkdir()
    assert load("mine_pkg.scores:score", [tmp_path / "empty", folder], "reward.function")() == 3


def test_an_installed_package_is_found_without_a_folder() -> None:
    assert load("json.decoder:JSONDecoder", [], "reward.function").__name__ == "JSONDecoder"


def test_the_folder_comes_before_what_is_installed(write: Callable[..., Path]) -> None:
    folder = write(
        site__mine_twice="def score(): return 'installed'", mine_twice="def score(): return 'mine'"
    )
    sys.path.insert(0, str(folder / "site"))
    assert load("mine_twice:score", [folder], "reward.function")() == "mine"


def test_an_installed_distribution_is_found(tmp_path: Path) -> None:
    """As pip leaves it, in a process that knows no folder."""
    wheel, target = tmp_path / "their_rewards-1-py3-none-any.whl", tmp_path / "site"
    files = {
        "their_rewards.py": "def score(): return 'installed'",
        "their_rewards-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: their-rewards\nVersion: 1\n",
        "their_rewards-1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files["their_rewards-1.dist-info/RECORD"] = "".join(f"{name},,\n" for name in files)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    pip += ["--disable-pip-version-check", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, timeout=60)
    script = "from megatron_rapo.user_code import load\nprint(load('their_rewards:score', [], 'x')())"
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stdout == "installed\n"


@pytest.mark.parametrize(
    ("address", "instead"),
    [
        ("my_rewards.score", '"my_rewards:score"'),
        ("my_rewards.py:score", '"my_rewards:score"'),
        ("./my_rewards.py:score", '"my_rewards:score"'),
        ("folder/my_rewards.py:score", '"folder.my_rewards:score"'),
        ("score", '"module:name"'),
        ("my rewards:score", '"module:name"'),
        ("", '"module:name"'),
    ],
)
def test_what_is_no_address_is_told_how_to_write_it(address: str, instead: str) -> None:
    assert refusal(address).endswith(f"is no address; write {instead}")


def test_a_module_that_is_not_there_is_told_with_the_near_one(write: Callable[..., Path]) -> None:
    folder = write(my_rewards="", other_thing="", pkg__inner="")
    text = refusal("my_reward:score", folder)
    assert f"there is no module my_reward in {folder}, which has my_rewards, other_thing, pkg.inner" in text
    assert text.endswith('and none is installed; did you mean "my_rewards:score"?')


def test_without_modules_the_folder_is_named(tmp_path: Path) -> None:
    text = refusal("my_reward:score", tmp_path)
    assert text.endswith(
        f"in {tmp_path}, which has no module, and none is installed; correct it, or run.code"
    )


@pytest.mark.parametrize("source", ["import no_such_thing", "def f(:", "1 / 0", "import sys; sys.exit(3)"])
def test_a_module_that_fails_is_told_with_its_own_traceback(write: Callable[..., Path], source: str) -> None:
    folder = write(mine_broken=f"import os\n\n{source}\n")
    text = refusal("mine_broken:score", folder)
    assert "the module mine_broken fails when it is imported; mend it" in text
    assert f'File "{folder}/mine_broken.py", line 3' in text
    assert "user_code.py" not in text
    assert "importlib" not in text


def test_an_error_in_a_neighbour_shows_both_files(write: Callable[..., Path]) -> None:
    folder = write(mine_outer="import mine_inner", mine_inner="raise ValueError('no key')")
    text = refusal("mine_outer:score", folder)
    assert re.search(r"mine_outer.py\", line 1.*mine_inner.py\", line 1.*ValueError: no key", text, re.DOTALL)


def test_a_name_that_is_not_there_is_told_with_the_near_one(write: Callable[..., Path]) -> None:
    folder = write(mine_names="import json\ndef score(): ...\ndef other(): ...")
    assert refusal("mine_names:scores", folder).endswith(
        f'{folder}/mine_names.py has no scores; did you mean "mine_names:score"?'
    )
    assert refusal("mine_names:zzz", folder).endswith("has no zzz; it has score, other")


@pytest.mark.parametrize("taken", ["sys", "json"])
def test_a_file_by_the_name_of_another_module_is_refused(write: Callable[..., Path], taken: str) -> None:
    folder = write(**{taken: "def score(): ..."})
    text = refusal(f"{taken}:score", folder)
    assert f"{folder}/{taken}.py cannot be imported, since {taken} is already the name of" in text
    assert text.endswith("; rename yours")


def test_a_file_does_not_stand_in_for_a_module_that_libraries_import_later(
    write: Callable[..., Path],
) -> None:
    folder = write(mine_beside="def f(): ...", antigravity="ours = 1", colorsys="ours = 1")
    load("mine_beside:f", [folder], "reward.function")
    assert not hasattr(importlib.import_module("colorsys"), "ours")
    text = refusal("antigravity:ours", folder)
    assert f"{folder}/antigravity.py cannot be imported, since antigravity is already the name of" in text


def test_a_file_and_a_package_of_one_name_are_refused(write: Callable[..., Path]) -> None:
    folder = write(mine_double="def score(): return 'file'")
    (folder / "mine_double").mkdir()
    assert load("mine_double:score", [folder], "x")() == "file", "a folder without __init__.py is no package"
    del sys.modules["mine_double"]
    (folder / "mine_double/__init__.py").write_text("def score(): return 'package'")
    assert "mine_double.py and the package " in (text := refusal("mine_double:score", folder))
    assert text.endswith("have one name, of which Python takes the package; rename one of them")


def test_what_cannot_be_called_as_it_will_be_is_refused_with_its_place(write: Callable[..., Path]) -> None:
    folder = write(mine_calls="VALUE = 3\n\ndef score(response): ...\n\ndef more(a, b, *, c): ...\n")

    def told(name: str) -> str:
        address = f"mine_calls:{name}"
        found = load(address, [folder], "reward.function")
        with pytest.raises(RapoError) as caught:
            in_order(found, ["response", "problem"], address, "reward.function")
        return str(caught.value)

    assert "is 3, which cannot be called; name a function that takes VALUE(response, problem)" in told(
        "VALUE"
    )
    assert re.search(
        r"mine_calls.py:3\) takes \(response\), but it is called as score\(response, problem\)", told("score")
    )
    assert "missing a required argument: 'c'" in told("more")


def test_what_can_be_called_passes(write: Callable[..., Path]) -> None:
    text = "class C:\n    def __call__(self, a, b): ...\nc = C()\ndef f(a, b, c=1): ...\nasync def g(*a): ..."
    folder = write(mine_fine=text)
    for name in ("c", "f", "g"):
        address = f"mine_fine:{name}"
        in_order(load(address, [folder], "x"), ["response", "problem"], address, "x")
    in_order(max, ["response", "problem"], "builtins:max", "x")


def test_the_place_is_a_file_and_a_line(write: Callable[..., Path]) -> None:
    folder = write(mine_place="class C:\n    def __call__(self): ...\nc = C()\n\ndef f(): ...\n")
    places = [place_of(load(f"mine_place:{name}", [folder], "x")) for name in ("f", "C", "c")]
    assert places == [f"{folder}/mine_place.py:{line}" for line in (5, 1, 1)]
    assert place_of(max) == "max"


def test_names_of_code_are_known_from_other_texts() -> None:
    assert is_named_in({"reward": {"functions": [{"use": "a.b:c"}]}})
    for text in ("http://localhost:8000", "localhost:8000", "01:00:00", "a b:c", "a:b:c", "/x/y:z", 3, None):
        assert not is_named_in({"x": [{"y": text}]})


def configured(tmp_path: Path, text: str, name: str = "run.toml") -> Path:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


# A text that names code: what options name it is theirs to test.
NAMED = '\n[observe]\nwandb = "offline"\nwandb_project = "mine:score"\n'


def test_the_folder_of_the_configuration_travels_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = configured(tmp_path, MINIMAL, "base/run.toml")
    over = configured(tmp_path, NAMED, "over/own.toml")
    monkeypatch.chdir(tmp_path)
    config = load_config([base.relative_to(tmp_path), over.relative_to(tmp_path)])
    assert config.run.code == [tmp_path / "over", tmp_path / "base"]
    monkeypatch.chdir("/")
    copy = configured(tmp_path, to_toml(config), "runs/config.toml")
    assert load_config([copy]) == config


def test_folders_of_code_can_be_given_and_are_kept_as_absolute_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config([configured(tmp_path, MINIMAL + NAMED)], ['run.code=["lib", "../other"]'])
    assert config.run.code == [tmp_path / "lib", tmp_path.parent / "other"]


def test_without_code_no_folder_is_kept_and_to_give_one_is_refused(tmp_path: Path) -> None:
    file = configured(tmp_path, MINIMAL)
    config = load_config([file])
    assert config.run.code == []
    assert isinstance(config, RunConfig)
    with pytest.raises(RapoError, match=r"run.code = \['.*lib'\] would have no effect: no option names a"):
        load_config([file], ["run.code=['lib']"])
