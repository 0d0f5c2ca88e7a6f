"""The network: sizes, initialisation, and its output against the definition in torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F


def random_obs(num: int):
    return torch.randint(256, (num, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("channels", "number"),
    [((16, 32, 32), 626_256), ((32, 64, 64), 1_441_680), ((28, 44, 60), 1_251_192)],  # as in the README
)
def test_number_of_parameters(script, channels, number):
    assert sum(weight.numel() for weight in script.Agent(channels=channels).parameters()) == number


def test_order_and_shapes_of_parameters(script):
    """Files of pretrained encoders depend on this order."""
    expected = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        for each in (inputs, *[outputs] * 4):  # the stage's own convolution and those of two residual blocks
            expected += [(outputs, each, 3, 3), (outputs,)]
    expected += [(256, 2048), (256,), (15, 256), (15,), (1, 256), (1,)]
    agent = script.Agent()
    assert [tuple(parameter.shape) for parameter in agent.parameters()] == expected
    heads = [*agent.actor.parameters(), *agent.critic.parameters()]
    parts = [*agent.encoder.parameters(), *heads]
    assert all(one is other for one, other in zip(parts, agent.parameters(), strict=True))


def test_shapes_of_outputs(script):
    logits, value = script.Agent()(random_obs(5))
    assert logits.shape == (5, 15) and value.shape == (5,)
    assert logits.dtype == value.dtype == torch.float32


def test_other_channels_and_actions(script):
    agent = script.Agent(num_actions=7, channels=(4, 6, 8))
    logits, value = agent(random_obs(1))
    assert logits.shape == (1, 7) and value.shape == (1,)
    assert [p.shape[0] for p in agent.encoder.parameters() if p.dim() == 4] == [4] * 5 + [6] * 5 + [8] * 5


def test_uint8_is_float_of_the_same_numbers(script):
    agent, obs = script.Agent(), random_obs(3)
    for from_uint8, from_float in zip(agent(obs), agent(obs.float()), strict=True):
        torch.testing.assert_close(from_uint8, from_float, rtol=0, atol=0)


def test_initialisation(script):
    """Orthogonal heads with gain 0.01 and 1 and no bias; PyTorch's default, uniform within 1/sqrt(fan_in),
    for all else."""
    torch.manual_seed(0)
    agent = script.Agent()
    actor, critic = agent.actor.weight.detach(), agent.critic.weight.detach()
    torch.testing.assert_close(actor @ actor.T, 0.01**2 * torch.eye(15), rtol=0, atol=1e-9)
    torch.testing.assert_close(critic.norm(), torch.tensor(1.0))
    assert not agent.actor.bias.any() and not agent.critic.bias.any()
    parameters = list(agent.encoder.parameters())
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        bound = weight[0].numel() ** -0.5
        assert 0.95 * bound < weight.abs().max() <= bound
        assert 0.5 * bound < bias.abs().max() <= bound


def test_is_the_impala_cnn(script):
    """Every layer where the specification has it, from the parameters in their order."""
    torch.manual_seed(0)
    agent, obs = script.Agent(channels=(4, 6, 8)), random_obs(2)
    agent.actor.weight.data *= 100
    weights = iter(agent.parameters())
    x = obs.permute(0, 3, 1, 2).float() / 255
    for _ in range(3):
        x = F.max_pool2d(F.conv2d(x, next(weights), next(weights), padding=1), 3, stride=2, padding=1)
        for _ in range(2):
            inner = F.conv2d(F.relu(x), next(weights), next(weights), padding=1)
            x = x + F.conv2d(F.relu(inner), next(weights), next(weights), padding=1)
    hidden = F.relu(F.linear(F.relu(x.flatten(1)), next(weights), next(weights)))
    expected_logits = F.linear(hidden, next(weights), next(weights))
    expected_value = F.linear(hidden, next(weights), next(weights))[:, 0]
    logits, value = agent(obs)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(value, expected_value)
