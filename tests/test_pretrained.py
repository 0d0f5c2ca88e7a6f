"""A new actor and critic on the encoder of an earlier run, frozen or trained on."""

import importlib
import os

import pytest
import torch
from common import BATCH_SIZE, MUTUAL, SINGLE, TINY, agent_folders, flags, load_agent, run_folder
from test_resume import differences, load, same, train

SETTINGS = TINY | {"total_timesteps": 4 * BATCH_SIZE, "eval_interval": 0, "seed": 5}
del SETTINGS["channels"]  # the file's


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The agent.pt of a mutual run of other settings and width."""
    folder, name = tmp_path_factory.mktemp("source"), MUTUAL[1]
    words = flags(**SETTINGS | {"channels": (4, 6, 8), "total_timesteps": BATCH_SIZE, "num_levels": 3})
    assert train(importlib.import_module(name), folder, *words) == 0
    return run_folder(folder) / "agent_2" / "agent.pt"


def parts(weights):
    """Weights of the encoder, and the others."""
    encoder = {name: weight for name, weight in weights.items() if name.startswith("encoder.")}
    return encoder, {name: weight for name, weight in weights.items() if name not in encoder}


@pytest.mark.parametrize("frozen", [True, False])
def test_the_encoder_is_the_one_of_the_file(script, source, tmp_path, frozen):
    """It, and nothing else; frozen it stays, to the bit, and otherwise all of it is trained."""
    words = ["--pretrained-encoder", source, *(["--freeze-encoder"] if frozen else [])]
    assert train(script, tmp_path, *words, *flags(**SETTINGS)) == 0
    given, given_heads = parts(load_agent(source)["agent"])
    for folder in agent_folders(script.__name__, run_folder(tmp_path)):
        content = load_agent(folder / "agent.pt")
        assert content["args"]["channels"] == (4, 6, 8)
        encoder, heads = parts(content["agent"])
        unchanged = [name for name in given if torch.equal(given[name], encoder[name])]
        assert unchanged == (list(given) if frozen else [])
        assert not any(torch.equal(given_heads[name], heads[name]) for name in heads)


def test_both_heads_start_anew(script, source, tmp_path, monkeypatch):
    """As they do without a file, and the encoder as in the file, before the first step."""
    saved = []
    monkeypatch.setattr(script, "save_checkpoint", lambda *inputs: saved.append(inputs[4]))
    monkeypatch.setattr(script, "rollout", lambda groups: [runner.close() for runner in saved[0]] and exit(3))
    assert train(script, tmp_path, "--pretrained-encoder", source, *flags(**SETTINGS)) == 3
    torch.manual_seed(5)
    given, _ = parts(load_agent(source)["agent"])
    for runner in saved[0]:
        encoder, heads = parts(runner.agent.state_dict())
        assert same(encoder, given)
        assert same(heads, parts(script.Agent(channels=(4, 6, 8)).state_dict())[1])


def test_a_frozen_encoder_has_no_backward_pass(script):
    agent = script.Agent(channels=(4, 4, 4))
    agent.encoder.requires_grad_(False)
    logits, _ = agent(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert logits.requires_grad
    nodes, names = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [following for following, _ in node.next_functions if following]
    assert not [name for name in names if "Conv" in name or "MaxPool" in name or "Relu" in name]


@pytest.mark.parametrize("name", [SINGLE[0], MUTUAL[0]])
def test_a_frozen_run_goes_on_without_the_file(name, source, tmp_path):
    script, runs = importlib.import_module(name), []
    for total in (SETTINGS["total_timesteps"], 2 * BATCH_SIZE):
        folder = tmp_path / str(total)
        folder.mkdir()
        copy = folder / "encoder.pt"
        copy.write_bytes(source.read_bytes())
        words = ["--pretrained-encoder", "encoder.pt", "--freeze-encoder", "--eval-interval", "2"]
        settings = {name: value for name, value in SETTINGS.items() if name != "eval_interval"}
        assert train(script, folder, *words, *flags(**settings | {"total_timesteps": total})) == 0
        runs.append(run_folder(folder))
        os.unlink(copy)
    longer = ["--total-timesteps", SETTINGS["total_timesteps"], "--device", "cpu"]
    assert train(script, tmp_path, "--resume", runs[1], *longer) == 0
    assert differences(name, *runs) == []
    assert len(load(runs[1] / "checkpoint.pt")["optimizer"]) == 4 * len(agent_folders(name, runs[1]))


BAD = {
    "missing": lambda path, good: None,
    "a folder": lambda path, good: path.mkdir(),
    "text": lambda path, good: path.write_text("weights"),
    "cut short": lambda path, good: path.write_bytes(good[: len(good) // 2]),
    "a tensor": lambda path, good: torch.save(torch.zeros(3), path),
    "weights alone": lambda path, good: torch.save(load(path.with_name("good"))["agent"], path),
    "no encoder": lambda path, good: torch.save(load(path.with_name("good")) | {"agent": {}}, path),
    "another width than it says": lambda path, good: torch.save(
        load(path.with_name("good")) | {"args": {"channels": (8, 8, 8)}}, path
    ),
    "no width": lambda path, good: torch.save(load(path.with_name("good")) | {"args": {}}, path),
    "a width that is none": lambda path, good: torch.save(
        load(path.with_name("good")) | {"args": {"channels": (0, 1, 2)}}, path
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", [SINGLE[0], MUTUAL[0]])
def test_bad_files(name, kind, source, tmp_path, capsys):
    """One line, and no run folder."""
    path = tmp_path / "agent.pt"
    path.with_name("good").write_bytes(source.read_bytes())
    BAD[kind](path, source.read_bytes())
    words = ["--pretrained-encoder", path, *flags(**SETTINGS)]
    assert train(importlib.import_module(name), tmp_path, *words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"{name}.py: error: --pretrained-encoder"), err
    assert str(path) in err and not (tmp_path / "runs").exists()


def test_freezing_needs_a_file(script, tmp_path, capsys):
    assert train(script, tmp_path, "--freeze-encoder") == 2
    assert (
        capsys.readouterr().err
        == f"{script.__name__}.py: error: --freeze-encoder needs --pretrained-encoder\n"
    )


@pytest.mark.parametrize("name", [SINGLE[0], MUTUAL[0]])
def test_channels_are_those_of_the_file(name, source, tmp_path, capsys):
    """Other ones are not silently given up."""
    words = ["--pretrained-encoder", source, *flags(**(SETTINGS | {"channels": (8, 4, 4)}))]
    assert train(importlib.import_module(name), tmp_path, *words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--channels must be (4, 6, 8)" in err and not (tmp_path / "runs").exists()
