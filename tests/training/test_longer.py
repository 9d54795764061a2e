"""A run that is made longer: to the bit the longer one where its rate is constant, by a rate that warms up again where not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from qvera.config.sections import TrainingSection
from qvera.training.optim import build_schedule
from qvera.training.trainer import train
from qvera.utils.errors import InputError, RunFailed
from tests.training.runs import losses, many_recipe, records, run_json, same, stop_after, vectors, write_rows

pytestmark = pytest.mark.process
SETTINGS = {"save_steps": 2, "sample_count": 0, "exact_match_rows": 0}


def longer(recipe: Any, run_dir: Path) -> str:
    """Go on, and what was said."""
    console = Console(record=True, width=1000)
    train(recipe, run_dir, resume=True, console=console)
    return console.export_text()


@pytest.mark.parametrize(("name", "length"), [("max_steps", 3), ("num_train_epochs", 0.5)])
def test_a_longer_run_of_a_constant_rate_is_to_the_bit_one_that_had_the_length_from_the_start(
    make_recipe: Any, tmp_path: Path, name: str, length: float
) -> None:
    """Also where it is lengthened twice, once in the middle."""
    constant = {**SETTINGS, "lr_scheduler_type": "constant", "warmup_steps": 2, "max_steps": -1}
    constant, twice, thrice = ({**constant, name: length * times} for times in (1, 2, 3))
    train(make_recipe(training=thrice), tmp_path / "whole")
    train(make_recipe(training=constant), tmp_path / "run")
    first = run_json(tmp_path / "run")["result"]["steps"]
    stop_after(make_recipe(training=twice), tmp_path / "run", first + 1, resume=True)
    said = longer(make_recipe(training=thrice), tmp_path / "run")
    assert (
        f"{2 * first} steps become {3 * first}: the learning rate stays constant from step {2 * first + 1} on" in said
    )
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same(vectors(tmp_path / "run"), vectors(tmp_path / "whole"))


@pytest.mark.parametrize(("method", "keys"), [("lora", {"sample_tokens": 0.5}), ("lora-sb", {})])
def test_a_run_of_another_method_is_made_longer_too(
    make_recipe: Any, tmp_path: Path, method: str, keys: dict[str, Any]
) -> None:
    def recipe(steps: int) -> Any:
        constant = {**SETTINGS, "lr_scheduler_type": "constant", "warmup_steps": 2, "max_steps": steps}
        return make_recipe(adapter={"method": method}, training={**constant, **keys})

    train(recipe(5), tmp_path / "whole")
    train(recipe(3), tmp_path / "run")
    longer(recipe(5), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same(vectors(tmp_path / "run"), vectors(tmp_path / "whole"))


def test_a_warmup_that_is_a_share_of_the_steps_stays_that_of_the_first_plan(make_recipe: Any, tmp_path: Path) -> None:
    """Also where it is lengthened within the warm-up: to the bit a run that was given those warm-up steps."""

    def recipe(steps: int, **warmup: float) -> Any:
        keys = {**SETTINGS, "lr_scheduler_type": "constant", "max_steps": steps, **warmup}
        return make_recipe(training=keys)

    train(recipe(8, warmup_steps=4), tmp_path / "whole")
    stop_after(recipe(5, warmup_ratio=0.8), tmp_path / "run", 2)
    said = longer(recipe(8, warmup_ratio=0.8), tmp_path / "run")
    assert "5 steps become 8: the learning rate keeps the warm-up that was planned first, and stays constant" in said
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same(vectors(tmp_path / "run"), vectors(tmp_path / "whole"))


def test_a_rate_that_has_decayed_warms_up_again_wherever_the_run_was_stopped(make_recipe: Any, tmp_path: Path) -> None:
    short, long = ({**SETTINGS, "max_steps": n, "warmup_steps": 1, "lr_scheduler_type": "linear"} for n in (4, 8))
    train(make_recipe(training=short), tmp_path / "done")
    stop_after(make_recipe(training=short), tmp_path / "cut", 3)
    (tmp_path / "done" / "adapter" / "README.md").write_text("My own words")
    for name in ("done", "cut"):
        said = longer(make_recipe(training=long), tmp_path / name)
        assert ("README.md: is kept, and describes the adapter before this." in said) == (name == "done")
        assert "4 steps become 8: the learning rate warms up again and decays (linear) from step 5 on" in said
    assert (tmp_path / "done" / "adapter" / "README.md").read_text() == "My own words"
    rates = [record["learning_rate"] for record in records(tmp_path / "done")]
    assert rates[4:] == rates[:4]
    assert losses(tmp_path / "cut") == losses(tmp_path / "done")
    assert same(vectors(tmp_path / "cut"), vectors(tmp_path / "done"))
    info = run_json(tmp_path / "done")
    info["result"]["peak_bytes"] = 10**12  # a process that takes no step has less
    (tmp_path / "done" / "run.json").write_text(json.dumps(info))
    said = longer(make_recipe(training=long), tmp_path / "done")  # it is done, and stays so
    assert run_json(tmp_path / "done")["result"]["peak_bytes"] == 10**12
    assert "All steps are done. A larger training.max_steps or training.num_train_epochs" in said


def test_the_rate_of_each_part_is_that_of_a_run_of_its_length() -> None:
    section = TrainingSection(learning_rate=1.0, lr_scheduler_type="cosine", warmup_ratio=0.2)

    def rates(steps: int, lengths: tuple[int, ...] = ()) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        schedule = build_schedule(section, optimizer, steps, lengths)
        found = []
        for _ in range(steps):
            found.append(float(schedule.get_last_lr()[0]))
            optimizer.step()
            schedule.step()
        return found

    assert rates(35, (10, 20)) == rates(10) + rates(10) + rates(15)


def test_what_cannot_be_made_longer_names_another_way(make_recipe: Any, tmp_path: Path) -> None:
    keys = {**SETTINGS, "max_steps": 3}
    train(make_recipe(training=keys), tmp_path / "run")
    with pytest.raises(InputError, match=r"is a run of 3 steps, and now has 2.*raise training\.max_steps or"):
        train(make_recipe(training={**keys, "max_steps": 2}), tmp_path / "run", resume=True)
    more = make_recipe(training={**keys, "max_steps": 6})
    again = rf"Start a new run from its adapter: adapter\.init_from={tmp_path}"
    info = run_json(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "early")
    (tmp_path / "early" / "run.json").write_text(
        json.dumps(info | {"result": info["result"] | {"stopped_early": True}})
    )
    with pytest.raises(InputError, match=f"can't go on to 6 steps, since it stopped early. {again}/early/adapter"):
        train(more, tmp_path / "early", resume=True)
    drawn = {**keys, "resample_every": 2}
    train(make_recipe(training=drawn), tmp_path / "drawn")  # begins with fresh vectors, so it takes no init_from
    with pytest.raises(
        InputError, match=r"new run of what `qvera export \S+/drawn OUT` writes, with OUT as model\.path"
    ):
        train(make_recipe(training={**drawn, "max_steps": 6}), tmp_path / "drawn", resume=True)
    shutil.rmtree(tmp_path / "drawn" / "adapter")
    with pytest.raises(InputError, match="new run when this one has come to its 3 steps, of what"):
        train(make_recipe(training={**drawn, "max_steps": 6}), tmp_path / "drawn", resume=True)
    spiel: dict[str, Any] = {"adapter": {"method": "spiel"}}
    train(make_recipe(training=keys, **spiel), tmp_path / "spiel")
    with pytest.raises(InputError, match=f"since what spiel or a schedule .* depends on how many there are. {again}"):
        train(make_recipe(training={**keys, "max_steps": 6}, **spiel), tmp_path / "spiel", resume=True)


def test_a_stopped_run_is_ended_at_its_last_checkpoint(make_recipe: Any, tmp_path: Path) -> None:
    keys: dict[str, Any] = {**SETTINGS, "max_steps": 8, "warmup_steps": 2}
    stop_after(make_recipe(training=keys), tmp_path / "run", 3)
    with pytest.raises(InputError, match=r"is a run of 8 steps, and now has 2\. .* set training\.max_steps=3\.$"):
        train(make_recipe(training={**keys, "max_steps": 2}), tmp_path / "run", resume=True)
    taken = losses(tmp_path / "run")
    train(make_recipe(training={**keys, "max_steps": 3}), tmp_path / "run", resume=True)
    ended = run_json(tmp_path / "run")
    assert (ended["status"], ended["result"]["steps"], ended["planned_steps"]) == ("done", 3, 3)
    assert losses(tmp_path / "run") == taken and len(taken) == 3
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000003" / "vectors.safetensors")
    assert same(vectors(tmp_path / "run"), saved)


def test_an_adapter_put_in_place_of_a_runs_own_is_kept_though_a_longer_run_was_stopped(
    make_recipe: Any, tmp_path: Path
) -> None:
    longer_keys = {**SETTINGS, "max_steps": 8}
    train(make_recipe(training={**SETTINGS, "max_steps": 2}), tmp_path / "run")
    stop_after(make_recipe(training=longer_keys), tmp_path / "run", 3, resume=True)
    mine = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    mine.write_bytes(b"another")
    with pytest.raises(InputError, match="another adapter is there now than this run wrote"):
        train(make_recipe(training=longer_keys), tmp_path / "run", resume=True)
    assert mine.read_bytes() == b"another"


def test_many_adapters_are_not_made_longer(make_recipe: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", {"anna": 9, "ben": 5})
    train(many_recipe(make_recipe, tmp_path / "rows.jsonl", {"max_steps": 2}), tmp_path / "run")
    with pytest.raises((InputError, RunFailed), match=r"can't go on to 8 steps, .*adapter\.init_from="):
        train(many_recipe(make_recipe, tmp_path / "rows.jsonl", {"max_steps": 4}), tmp_path / "run", resume=True)
