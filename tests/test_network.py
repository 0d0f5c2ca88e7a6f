"""The network: sizes, initialisation, and its output against the definition in torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F

# What agent.pt of every release holds under "agent", in this order.
LAYERS = ["encoder.14", "actor", "critic"]
for stage in (8, 4, 0):
    blocks = [f"{stage + 2}.1", f"{stage + 2}.3", f"{stage + 3}.1", f"{stage + 3}.3"]
    LAYERS = [f"encoder.{layer}" for layer in (stage, *blocks)] + LAYERS
NAMES = [f"{layer}.{name}" for layer in LAYERS for name in ("weight", "bias")]


def random_obs(num: int, *shape: int):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (num, *(shape or (64, 64, 3))), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("channels", "number"),
    [((16, 32, 32), 626_256), ((32, 64, 64), 1_441_680), ((28, 44, 60), 1_251_192)],  # as in the README
)
def test_number_of_parameters(script, channels, number):
    agent = script.Agent(channels=channels)
    assert sum(weight.numel() for weight in agent.parameters()) == number


def test_order_and_shapes_of_parameters(script):
    """Saved agents and pretrained encoders depend on them."""
    expected = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        for each in (inputs, *[outputs] * 4):  # the stage's own convolution and those of two residual blocks
            expected += [(outputs, each, 3, 3), (outputs,)]
    expected += [(256, 2048), (256,), (15, 256), (15,), (1, 256), (1,)]
    agent = script.Agent()
    assert [tuple(parameter.shape) for parameter in agent.parameters()] == expected
    assert list(agent.state_dict()) == NAMES


@pytest.mark.parametrize(
    ("shape", "features"),  # three times half as high and wide, rounded up, in 8 channels
    [((24, 16, 1), 3 * 2 * 8), ((8, 8, 3), 8), ((1, 1, 2), 8), ((65, 84, 4), 9 * 11 * 8)],
)
def test_observations_of_any_size(script, shape, features):
    torch.manual_seed(0)
    agent = script.Agent(num_actions=7, channels=(4, 6, 8), obs_shape=shape)
    logits, value = agent(random_obs(3, *shape))
    assert logits.shape == (3, 7)
    assert value.shape == (3,)
    weights = dict(agent.named_parameters())
    assert weights["encoder.0.weight"].shape == (4, shape[2], 3, 3)
    assert weights["encoder.4.weight"].shape == (6, 4, 3, 3)
    assert weights["encoder.14.weight"].shape == (256, features)
    value.sum().backward()
    assert weights["encoder.0.weight"].grad.any()


def test_initialisation(script):
    """Orthogonal heads with gain 0.01 and 1 and no bias; PyTorch's default, uniform within 1/sqrt(fan_in),
    for all else."""
    torch.manual_seed(0)
    agent = script.Agent()
    actor = agent.actor.weight.detach()
    critic = agent.critic.weight.detach()
    torch.testing.assert_close(actor @ actor.T, 0.01**2 * torch.eye(15), rtol=0, atol=1e-9)
    torch.testing.assert_close(critic.norm(), torch.tensor(1.0))
    assert not agent.actor.bias.any()
    assert not agent.critic.bias.any()
    parameters = list(agent.encoder.parameters())
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        bound = weight[0].numel() ** -0.5
        assert 0.95 * bound < weight.abs().max() <= bound
        assert 0.5 * bound < bias.abs().max() <= bound


def test_is_the_impala_cnn(script):
    """Every layer where the specification has it, from the parameters in their order. Floats in [0, 255] do
    as well as uint8."""
    torch.manual_seed(0)
    agent = script.Agent(channels=(4, 6, 8))
    obs = random_obs(2)
    agent.actor.weight.data *= 100
    weights = iter(agent.parameters())
    x = obs.permute(0, 3, 1, 2).float() / 255
    for _ in range(3):
        x = F.conv2d(x, next(weights), next(weights), padding=1)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for _ in range(2):
            inner = F.conv2d(F.relu(x), next(weights), next(weights), padding=1)
            x = x + F.conv2d(F.relu(inner), next(weights), next(weights), padding=1)
    features = F.relu(x.flatten(1))
    hidden = F.relu(F.linear(features, next(weights), next(weights)))
    expected_logits = F.linear(hidden, next(weights), next(weights))
    expected_value = F.linear(hidden, next(weights), next(weights))[:, 0]
    for each in (obs, obs.float()):
        logits, value = agent(each)
        # float32, computed by other kernels
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value, expected_value, rtol=1e-4, atol=1e-5)


def test_bf16_stays_within_the_encoder(script):
    """Switched on, it rounds what the heads get, and these compute in float32 as before."""
    torch.manual_seed(0)
    agent = script.Agent(channels=(4, 4, 4))
    obs = random_obs(8)
    exact = agent(obs)
    agent.bf16 = True
    inside = []
    agent.encoder.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    rounded = agent(obs)
    assert inside == [torch.bfloat16]
    assert [each.dtype for each in rounded] == [torch.float32] * 2
    for one, other in zip(rounded, exact):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.01)
