"""A new actor and critic on the encoder of an earlier run, frozen or trained on."""

import importlib
import math
import os
import sys

import pytest
import torch
from algorithm import CPU, make_small_probes
from common import (
    MUTUAL,
    SINGLE,
    TINY,
    agent_folders,
    flags,
    load_agent,
    make_agents,
    make_probes,
    run_folder,
    save_agent,
)

SETTINGS = {name: value for name, value in TINY.items() if name != "channels"}  # the file's
SETTINGS |= {"num_envs": 2, "num_minibatches": 1, "update_epochs": 1, "eval_interval": 0, "seed": 5}
BATCH_SIZE = 32
TWO_SCRIPTS = [SINGLE[0], MUTUAL[0]]


@pytest.fixture(params=TWO_SCRIPTS)
def two(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The agent.pt of another script, of other settings and width."""
    script = importlib.import_module(MUTUAL[1])
    agent = script.Agent(channels=(4, 6, 8))
    path = tmp_path_factory.mktemp("source") / "agent.pt"
    return save_agent(path, agent, script=MUTUAL[1], channels=(4, 6, 8), num_levels=3)


def train(script, folder, make_envs=make_probes, **settings):
    """A run on the probe, with the settings of a command line. Returns its folder."""
    words = [f"{script.__name__}.py"]
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}"] if value is True else flags(**{name: value})
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", words)
        patch.setattr(script, "make_envs", make_envs)
        script.main(script.parse_args())
    return run_folder(folder)


def parts(weights):
    """Weights of the encoder, and the others."""
    encoder = {name: weight for name, weight in weights.items() if name.startswith("encoder.")}
    heads = {name: weight for name, weight in weights.items() if name not in encoder}
    return encoder, heads


@pytest.mark.parametrize("frozen", [True, False])
def test_the_encoder_is_the_one_of_the_file(two, source, tmp_path, frozen):
    """It, and nothing else; frozen it stays, to the bit, and otherwise all of it is trained."""
    options = {"pretrained_encoder": source}
    if frozen:
        options["freeze_encoder"] = True
    run_dir = train(two, tmp_path, **SETTINGS | options | {"total_timesteps": 2 * BATCH_SIZE})
    given, given_heads = parts(load_agent(source)["agent"])
    for folder in agent_folders(two.__name__, run_dir):
        content = load_agent(folder / "agent.pt")
        assert content["args"]["channels"] == (4, 6, 8)
        encoder, heads = parts(content["agent"])
        unchanged = [name for name in given if torch.equal(given[name], encoder[name])]
        assert unchanged == (list(given) if frozen else [])
        assert not any(torch.equal(given_heads[name], heads[name]) for name in heads)


def test_both_heads_start_anew(two, source, tmp_path, monkeypatch):
    """As they do without a file, and the encoder as in the file, before the first step."""
    monkeypatch.setattr(two, "make_envs", make_probes)
    args = two.Args(**SETTINGS, channels=(4, 6, 8))
    given, _ = parts(load_agent(source)["agent"])
    torch.manual_seed(5)
    agents, _, runners = two.set_up(args, tmp_path, CPU, 0, given_encoder(given))
    for runner in runners:
        runner.close()
    torch.manual_seed(5)
    for agent in agents:
        encoder, heads = parts(agent.state_dict())
        _, expected_heads = parts(two.Agent(channels=(4, 6, 8)).state_dict())
        torch.testing.assert_close(encoder, given, rtol=0, atol=0)
        torch.testing.assert_close(heads, expected_heads, rtol=0, atol=0)


def given_encoder(weights):
    """As the script reads them from a file."""
    return {name.removeprefix("encoder."): weight for name, weight in weights.items()}


def test_a_frozen_encoder_has_no_backward_pass(two):
    (agent,) = make_agents(two, 1)
    agent.encoder.requires_grad_(False)
    logits, _ = agent(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert logits.requires_grad
    nodes = [logits.grad_fn]
    names = set()
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [following for following, _ in node.next_functions if following]
    assert not [name for name in names if "Conv" in name or "MaxPool" in name or "Relu" in name]


def test_a_frozen_run_goes_on_without_the_file(two, source, tmp_path):
    """As one that was never stopped."""
    runs = []
    for iterations in (4, 2):
        folder = tmp_path / str(iterations)
        folder.mkdir()
        copy = folder / "encoder.pt"
        copy.write_bytes(source.read_bytes())
        options = {"pretrained_encoder": "encoder.pt", "freeze_encoder": True, "eval_interval": 2}
        options["total_timesteps"] = iterations * BATCH_SIZE
        runs.append(train(two, folder, **SETTINGS | options))
        os.unlink(copy)
    straight, stopped = runs
    train(two, tmp_path / "2", resume=stopped, total_timesteps=4 * BATCH_SIZE, device="cpu")
    expected, checkpoint = (
        torch.load(run_dir / "checkpoint.pt", weights_only=True) for run_dir in (straight, stopped)
    )
    for part in ("agents", "optimizer"):
        torch.testing.assert_close(checkpoint[part], expected[part], rtol=0, atol=0)
    assert len(expected["optimizer"]) == 4 * len(expected["agents"])  # two heads, of a weight and a bias
    assert checkpoint["position"] == expected["position"]


def saved(source, **changes) -> dict:
    return load_agent(source) | changes


def with_nan(source) -> dict:
    content = load_agent(source)
    content["agent"]["encoder.0.bias"][0] = math.nan
    return content


BAD = {
    "missing": lambda path, source: None,
    "a folder": lambda path, source: path.mkdir(),
    "a name that is too long": lambda path, source: None,
    "text": lambda path, source: path.write_text("weights"),
    "cut short": lambda path, source: path.write_bytes(source.read_bytes()[:20_000]),
    "a tensor": lambda path, source: torch.save(torch.zeros(3), path),
    "weights alone": lambda path, source: torch.save(load_agent(source)["agent"], path),
    "no encoder": lambda path, source: torch.save(saved(source, agent={}), path),
    "another width": lambda path, source: torch.save(saved(source, args={"channels": (8, 8, 8)}), path),
    "not finite": lambda path, source: torch.save(with_nan(source), path),
    "no width": lambda path, source: torch.save(saved(source, args={}), path),
    "an impossible width": lambda path, source: torch.save(saved(source, args={"channels": (0, 1, 2)}), path),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(kind, source, tmp_path):
    """One line that names flag and file, and no run folder."""
    script = importlib.import_module(TWO_SCRIPTS[0])
    path = tmp_path / "agent.pt"
    if kind == "a name that is too long":
        path = tmp_path / ("x" * 300)
    BAD[kind](path, source)
    with pytest.raises(script.Failure) as failure:
        train(script, tmp_path, **SETTINGS, pretrained_encoder=path)
    message = str(failure.value)
    assert message.startswith("--pretrained-encoder")
    assert str(path) in message
    assert "\n" not in message
    assert ("an agent.pt in it would do" in message) == (kind == "a folder")
    assert not (tmp_path / "runs").exists()


def test_freezing_needs_a_file(two):
    with pytest.raises(ValueError, match="--freeze-encoder needs --pretrained-encoder"):
        two.Args(freeze_encoder=True)


def test_channels_are_those_of_the_file(two, source, tmp_path):
    """Other ones are not silently given up."""
    with pytest.raises(two.Failure) as failure:
        train(two, tmp_path, **SETTINGS, pretrained_encoder=source, channels=(8, 4, 4))
    assert "--channels must be (4, 6, 8)" in str(failure.value)
    assert not (tmp_path / "runs").exists()


def test_an_encoder_of_other_pictures(two, tmp_path):
    """Environments of one's own may have them: the encoder fits if it comes from the same."""
    agent = two.Agent(channels=(4, 6, 8), obs_shape=(16, 16, 3))
    path = save_agent(tmp_path / "agent.pt", agent, channels=(4, 6, 8))
    settings = SETTINGS | {"pretrained_encoder": path, "freeze_encoder": True, "total_timesteps": BATCH_SIZE}
    run_dir = train(two, tmp_path, make_small_probes, **settings)
    given, _ = parts(agent.state_dict())
    for folder in agent_folders(two.__name__, run_dir):
        encoder, _ = parts(load_agent(folder / "agent.pt")["agent"])
        torch.testing.assert_close(encoder, given, rtol=0, atol=0)
