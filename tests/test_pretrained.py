"""A new actor and critic on the encoder of an earlier run, frozen or trained on."""

import importlib

import pytest
import torch
from algorithm import CPU, make_small_probes
from common import (
    BOTH,
    MUTUAL,
    TINY,
    agent_folders,
    flags,
    load,
    read_points,
    run_folder,
    same,
    save_agent,
    train,
    without_boxes,
)
from resumed import error_line

SETTINGS = {name: value for name, value in TINY.items() if name != "channels"}  # the file's
SETTINGS |= {"num_envs": 2, "num_minibatches": 1, "update_epochs": 1, "eval_interval": 0, "seed": 5}
BATCH_SIZE = 32
WIDTHS = (4, 6, 8)
PICTURES = (16, 16, 3)


@pytest.fixture(params=BOTH)
def two(request, monkeypatch):
    """Scripts that train on the probe, in pictures of their own size."""
    script = importlib.import_module(request.param)
    monkeypatch.setattr(script, "make_envs", make_small_probes)
    return script


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The agent.pt of another script, of other settings and width."""
    script = importlib.import_module(MUTUAL[1])
    agent = script.Agent(channels=WIDTHS, obs_shape=PICTURES)
    path = tmp_path_factory.mktemp("source") / "agent.pt"
    return save_agent(path, agent, script=MUTUAL[1], channels=WIDTHS, num_levels=3)


def parts(weights):
    """Weights of the encoder, and the others."""
    encoder = {name: weight for name, weight in weights.items() if name.startswith("encoder.")}
    heads = {name: weight for name, weight in weights.items() if name not in encoder}
    return encoder, heads


def test_both_heads_start_anew(two, source):
    """As they do without a file, and the encoder as in the file, before the first step."""
    given, _ = parts(load(source)["agent"])
    args = two.Args(**SETTINGS, pretrained_encoder=str(source))
    torch.manual_seed(5)
    agents, _, _ = two.set_up(args, CPU)
    torch.manual_seed(5)
    for agent in agents:
        encoder, heads = parts(agent.state_dict())
        _, expected_heads = parts(two.Agent(channels=WIDTHS, obs_shape=PICTURES).state_dict())
        assert same(encoder, given)
        assert same(heads, expected_heads)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_run_with_the_encoder_of_a_file(two, source, tmp_path, capsys, frozen):
    """Frozen it stays, to the bit, and otherwise all of it is trained; the heads are. The run goes on without
    the file as one that was never stopped, and whether it is frozen must stay."""
    runs = []
    for iterations in (4, 2):
        folder = tmp_path / str(iterations)
        folder.mkdir()
        copy = folder / "encoder.pt"
        copy.write_bytes(source.read_bytes())
        settings = {"pretrained_encoder": "encoder.pt", "freeze_encoder": frozen}
        settings["total_timesteps"] = iterations * BATCH_SIZE
        assert train(two, folder, *flags(**SETTINGS | settings)) == 0
        copy.unlink()
        runs.append(run_folder(folder))
    straight, stopped = runs
    capsys.readouterr()
    line = error_line(two, tmp_path, capsys, "--resume", stopped, *flags(freeze_encoder=not frozen))
    assert line.startswith(f"--freeze-encoder must stay {frozen}, as in")
    assert train(two, tmp_path, *flags(resume=stopped, total_timesteps=4 * BATCH_SIZE)) == 0
    checkpoint = load(stopped / "checkpoint.pt")
    for part, value in load(straight / "checkpoint.pt").items():
        assert part == "runners" or same(checkpoint[part], value), part
    given, given_heads = parts(load(source)["agent"])
    for folder, other in zip(agent_folders(two.__name__, straight), agent_folders(two.__name__, stopped)):
        content = load(folder / "agent.pt")
        assert content["args"]["channels"] == WIDTHS
        encoder, heads = parts(content["agent"])
        unchanged = [name for name in given if torch.equal(given[name], encoder[name])]
        assert unchanged == (list(given) if frozen else [])
        assert not any(torch.equal(given_heads[name], heads[name]) for name in heads)
        assert read_points(folder) == read_points(other)


def changed(source, **changes) -> dict:
    return load(source) | changes


def of_other_pictures() -> dict:
    agent = importlib.import_module(BOTH[0]).Agent(channels=WIDTHS, obs_shape=(32, 32, 3))
    return {"args": {"channels": WIDTHS}, "agent": agent.state_dict()}


BAD = {
    "a folder": lambda path, source: path.mkdir(),
    "cut short": lambda path, source: path.write_bytes(source.read_bytes()[:20_000]),
    "weights alone": lambda path, source: torch.save(load(source)["agent"], path),
    "a checkpoint": lambda path, source: torch.save({"args": {"channels": WIDTHS}, "agents": []}, path),
    "another width": lambda path, source: torch.save(changed(source, args={"channels": (8, 8, 8)}), path),
    "other pictures": lambda path, source: torch.save(of_other_pictures(), path),
    "no encoder": lambda path, source: torch.save(changed(source, agent={}), path),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(two, kind, source, tmp_path, capsys):
    """One line that names flag and file, and no run folder."""
    path = tmp_path / "agent.pt"
    BAD[kind](path, source)
    words = flags(**SETTINGS, pretrained_encoder=path)
    line = error_line(two, tmp_path, capsys, *words)
    assert line.startswith("--pretrained-encoder")
    assert str(path) in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("channels", [(8, 4, 4), (16, 32, 32)])
def test_channels_are_those_of_the_file(two, source, tmp_path, capsys, channels):
    """Other ones are not silently given up, the default's neither; the same ones may be given."""
    words = flags(**SETTINGS, pretrained_encoder=source)
    assert train(two, tmp_path, *words, *flags(channels=channels)) == 2
    assert f"--channels must be {WIDTHS}, as in {source}" in without_boxes(capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()
    assert two.Args(**SETTINGS, pretrained_encoder=str(source), channels=WIDTHS).channels == WIDTHS
    assert two.Args(**SETTINGS, pretrained_encoder=str(source)).channels == WIDTHS
    assert two.Args(**SETTINGS).channels == (16, 32, 32)
