"""`NextLatentWrapper` and `LatentAutoregressive`: their losses by hand, on every kind of decoder and head."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturb
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError
from x_transformers.gpt_lejepa import LatentAutoregressive
from x_transformers.losses import ahead, sigreg_loss
from x_transformers.next_latent_wrapper import MSECosineSimLoss, NextLatentWrapper

VOCAB, DIM, N = 12, 16, 8
NETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "tied": ({}, {"tie_embedding": True}),
    "mixture of softmaxes": ({}, {"mixture_of_softmax": True, "mixture_of_softmax_k": 2}),
    "sigsoftmax": ({}, {"sigsoftmax_logits": True}),
    "memory tokens": ({}, {"num_memory_tokens": 2}),
    "memory tokens between": ({}, {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 3}),
    "residual streams": ({"num_residual_streams": 2}, {}),
    "mix of layers": ({"integrate_layers": True}, {}),
    "two residuals": ({"resi_dual": True}, {}),
}
EVERY_NET = pytest.mark.parametrize("kind", NETS)


def net(kind: str = "plain") -> TransformerWrapper:
    stack, model = NETS[kind]
    layers = Decoder(dim=DIM, depth=2, heads=2, attn_dim_head=8, verbose=False, **stack)
    return TransformerWrapper(num_tokens=VOCAB, max_seq_len=16, attn_layers=layers, **model)


def crossed(options: dict[str, Any], one: str) -> list[tuple[str, str]]:
    """Every net with one set of options, and every set with the plain net."""
    return [*((kind, one) for kind in NETS), *(("plain", name) for name in options if name != one)]


def ids(*, ignored: bool = True) -> Tensor:
    x = torch.randint(0, VOCAB, (3, N))
    if ignored:
        x[1, 6:], x[2, 3] = -100, -100
    return x


def mean(each: Tensor, counts: Tensor) -> Tensor:
    return each[counts].mean()


# what both use


def test_what_comes_after_each_position() -> None:
    t = torch.arange(10.0).view(1, 5, 2)
    out = ahead(t, 3)
    assert out.shape == (3, 1, 4, 2)
    for r in range(3):
        for place in range(4):
            later = place + 1 + r
            close(out[r, :, place], t[:, later] if later < 5 else torch.zeros(1, 2))


def test_sigreg_by_hand() -> None:
    x, valid = torch.randn(2, 5, 3), torch.rand(2, 5) < 0.6
    torch.manual_seed(0)
    got = sigreg_loss(x, 7, (-2, 3), 9, valid=valid)
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(7, 3), dim=-1)
    knots, total = torch.linspace(-2, 3, 9), []
    phi = (-knots.square() / 2).exp()
    for u in directions:
        psi = torch.exp(1j * knots * (x[valid] @ u)[:, None]).mean(dim=0)
        total.append(torch.trapezoid((psi - phi).abs().square() * phi, knots))
    close(got, torch.stack(total).mean())
    assert sigreg_loss(x, valid=torch.zeros(2, 5, dtype=torch.bool)) == 0, "no features, no loss"
    normal, constant = torch.randn(4096, 3), torch.ones(4096, 3)
    assert sigreg_loss(normal) < 0.01 < sigreg_loss(constant)
    with pytest.raises(ConfigError, match="2 points"):
        sigreg_loss(x, num_knots=1)


# NextLatentWrapper

DYNAMICS: dict[str, dict[str, Any]] = {
    "residual": {},
    "three": {"num_rollouts": 3, "rollout_weights": [1, 2, 3.0], "dynamics_num_layers": 2},
    "gru": {"num_rollouts": 2, "dynamics_type": "gru", "loss_type": "mse"},
    "directions": {"num_rollouts": 2, "loss_type": "mse_and_cosine_sim", "dynamic_loss_decay": 3.0},
    "constant weights": {"num_rollouts": 2, "dynamic_rollout_loss_weight": False, "dynamics_hidden_dim": 5},
}


def rollouts_by_hand(model: NextLatentWrapper, h: Tensor, e: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of the next states and of the tokens that they predict, one rollout after the other."""
    n = h.shape[1]
    state, hidden, wrong, losses = h[:, :-1], h[:, :-1].flatten(0, 1)[None].contiguous(), 0.0, [0.0, 0.0]
    for r in range(model.num_rollouts):
        embeds, target = torch.zeros(3, n - 1, DIM), torch.zeros(3, n - 1, DIM)
        counts = torch.zeros(3, n - 1, dtype=torch.bool)
        embeds[:, : n - 1 - r], target[:, : n - 1 - r] = e[:, 1 + r :], h[:, 1 + r :]
        counts[:, : n - 1 - r] = valid[:, r:]
        if hasattr(model.dynamics_model, "gru"):
            out, hidden = model.dynamics_model.gru(embeds.flatten(0, 1)[:, None], hidden)
            state = out.view(3, n - 1, DIM)
        else:
            state = state + model.dynamics_model.net(torch.cat((state, embeds), dim=-1))
        error = model.loss_fn(state, target).mean(dim=-1)
        weight = model.rollout_weights[r] * torch.exp(torch.as_tensor(-model.dynamic_loss_decay * wrong))
        p, q = (model.net.logits_of(each).log_softmax(dim=-1) for each in (target, state))
        losses[0] += mean(weight * error, counts)
        losses[1] += mean(weight * (p.exp() * (p - q)).sum(dim=-1), counts)
        wrong = wrong + error.detach()
    return losses[0], losses[1]


@pytest.mark.parametrize(("kind", "dynamics"), crossed(DYNAMICS, "three"))
@torch.no_grad()
def test_the_next_latent_loss_by_hand(kind: str, dynamics: str) -> None:
    options = {"next_latent_loss_weight": 0.5, "kl_loss_weight": 2.0, "sigreg_loss_weight": 0.3, **DYNAMICS[dynamics]}
    model, x = perturb(NextLatentWrapper(net(kind), dim=DIM, **options)).eval(), ids()
    torch.manual_seed(0)
    total, parts = model(x, return_loss_breakdown=True)
    shown, valid = x.clamp(min=0), x[:, 1:] != -100
    h = model.net(shown, return_embeddings=True)
    log_probs = model.net.logits_of(h[:, :-1]).log_softmax(dim=-1)
    close(parts.ce, mean(-log_probs.gather(-1, shown[:, 1:, None])[..., 0], valid))
    next_latent, kl = rollouts_by_hand(model, h, model.token_emb(shown), valid)
    close(parts.next_latent, next_latent)
    close(parts.kl, kl)
    torch.manual_seed(0)
    close(parts.sigreg, sigreg_loss(h[:, :-1][valid]))
    close(total, parts.ce + 0.5 * parts.next_latent + 2 * parts.kl + 0.3 * parts.sigreg)


@EVERY_NET
def test_the_head_is_a_constant_for_predicted_states(kind: str) -> None:
    model = perturb(NextLatentWrapper(net(kind), dim=DIM)).eval()
    parts = model(ids(), return_loss_breakdown=True)[1]
    head = [p for name, p in model.net.named_parameters() if name.startswith(("to_logits", "mixture"))]
    for gradient in torch.autograd.grad(parts.kl, head, allow_unused=True, retain_graph=True) if head else ():
        assert gradient is None or not gradient.any()
    learned = torch.autograd.grad(parts.kl, list(model.dynamics_model.parameters()))
    assert all(gradient.any() for gradient in learned)


def test_custom_parts() -> None:
    class Still(nn.Module):
        def forward(self, embeds: Tensor, state: Tensor) -> Tensor:
            return state.expand_as(embeds)

    model = NextLatentWrapper(
        net(),
        dim=DIM,
        num_rollouts=2,
        dynamics_type="custom",
        dynamics_network=Still(),
        loss_type=MSECosineSimLoss(0.5),
    )
    assert model(ids(), return_loss_breakdown=True)[1].next_latent > 0


@torch.no_grad()
def test_prepended_embeddings_are_no_tokens() -> None:
    """Hidden ones change nothing; others change the states, and their number not."""
    for wrapper in (NextLatentWrapper, LatentAutoregressive):
        model, x, embeds = perturb(wrapper(net(), dim=DIM, num_rollouts=2)).eval(), ids(), torch.randn(3, 2, DIM)
        losses = []
        for given in ({}, {"prepend_mask": torch.zeros(3, 2, dtype=torch.bool)}, {"prepend_mask": None}):
            torch.manual_seed(0)
            losses.append(model(x, **({"prepend_embeds": embeds, **given} if given else {})))
        close(losses[1], losses[0])
        assert (losses[2] - losses[0]).abs() > 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 8}, "all three must be equal"),
        ({"loss_type": "l1"}, "`loss_type` is 'l1'"),
        ({"dynamics_type": "lstm"}, "`dynamics_type` is 'lstm'"),
        ({"dynamics_type": "custom"}, "a network is missing"),
        ({"dynamics_type": "gru", "dynamics_hidden_dim": 4}, "of the residual network"),
        ({"num_rollouts": 0}, "at least one later state"),
        ({"rollout_weights": [1.0, 2.0]}, "must hold 1 numbers"),
    ],
)
def test_next_latent_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NextLatentWrapper(net(), **{"dim": DIM, **options})


# LatentAutoregressive

OBJECTIVES: dict[str, dict[str, Any]] = {
    "default": {},
    "both": {"num_rollouts": 3, "predict_next_embed_no_action": True, "rollout_loss_weights": [3.0, 2.0, 1.0]},
    "features": {"predictor_input_hiddens_index": None, "predict_next_cosine_sim": False, "frac_gradient": 0.25},
    "far": {"num_rollouts": 20, "predictor_input_hiddens_index": 0, "detach_target": False},
}


@pytest.mark.parametrize(("kind", "objective"), crossed(OBJECTIVES, "both"))
@torch.no_grad()
def test_the_latent_loss_by_hand(kind: str, objective: str) -> None:
    options = {"sigreg_loss_weight": 0.2, "l2_loss_weight": 3.0, **OBJECTIVES[objective]}
    model, x = perturb(LatentAutoregressive(net(kind), dim=DIM, **options)).eval(), ids()
    torch.manual_seed(0)
    total, parts = model(x, return_loss_breakdown=True)
    shown, valid = x.clamp(min=0), x[:, 1:] != -100
    features, record = model.net(shown, return_embeddings_and_intermediates=True)
    log_probs = model.net.logits_of(features[:, :-1]).log_softmax(dim=-1)
    close(parts.ce, mean(-log_probs.gather(-1, shown[:, 1:, None])[..., 0], valid))
    low = features
    if model.hidden is not None and kind in ("residual streams", "two residuals"):
        low = record.memory_inputs[model.hidden]
    elif model.hidden is not None and kind == "memory tokens between":
        low = torch.cat([t[:, 2:] for t in record.hiddens[model.hidden].split(5, dim=1)], dim=1)
    elif model.hidden is not None:
        low = record.hiddens[model.hidden][:, -N:]  # memory tokens come first
    assert low.shape == features.shape
    squares = [torch.tensor(0.0), torch.tensor(0.0)]
    for index, predictor in enumerate((model.to_next_embed_pred, model.to_next_embed_no_action_pred)):
        state = low[:, :-1]
        for r in range(min(model.num_rollouts, N - 1) if predictor is not None else 0):
            if index == 0:
                later = torch.zeros(3, N - 1, dtype=torch.long)
                later[:, : N - 1 - r] = shown[:, 1 + r :]
                state = predictor(torch.cat((state, model.action_emb(later)), dim=-1))
            else:
                state = predictor(state)
            got, wanted = state[:, : N - 1 - r], features[:, 1 + r :]
            if model.cosine:
                got, wanted = F.normalize(got, dim=-1), F.normalize(wanted, dim=-1)
            squares[index] = squares[index] + model.rollout_weights[r] * mean(
                (got - wanted).square().mean(dim=-1), valid[:, r:]
            )
    close(parts.l2, squares[0])
    close(parts.l2_no_action, squares[1])
    torch.manual_seed(0)
    sigreg = [sigreg_loss(features[:, :-1][valid])]
    if model.hidden is not None:
        sigreg.append(sigreg_loss(low[:, :-1][valid]))
    close(parts.sigreg, sum(sigreg) / len(sigreg))
    close(total, parts.ce + 0.8 * 3 * (parts.l2 + parts.l2_no_action) + 0.2 * parts.sigreg)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_the_fraction_of_the_gradient_of_the_next_token(fraction: float) -> None:
    model, x = perturb(LatentAutoregressive(net(), dim=DIM, frac_gradient=fraction)).eval(), ids()
    weight = model.net.attn_layers.final_norm.gamma
    ce = model(x, return_loss_breakdown=True)[1].ce
    (got,) = torch.autograd.grad(ce, weight, allow_unused=True)
    model.frac_gradient = 1.0
    (whole,) = torch.autograd.grad(model(x, return_loss_breakdown=True)[1].ce, weight)
    if fraction:
        close(got, fraction * whole)
    else:
        assert got is None or not got.any()


@pytest.mark.parametrize("options", [{}, {"sigreg_loss_weight": 0.0}], ids=["default", "nothing above learns"])
def test_every_parameter_has_a_gradient(options: dict[str, Any]) -> None:
    model = LatentAutoregressive(net(), dim=DIM, **options)
    model(ids()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@EVERY_NET
def test_the_model_generates_by_its_probe(kind: str) -> None:
    model, x = (
        perturb(LatentAutoregressive(net(kind), dim=DIM, ce_probe_module=nn.Linear(DIM, DIM))),
        ids(ignored=False),
    )
    wrapper = AutoregressiveWrapper(model.net)
    close(
        wrapper.generate(x[:, :3], 5, temperature=0.0), wrapper.generate(x[:, :3], 5, temperature=0.0, cache_kv=False)
    )
    with pytest.raises(ConfigError, match="a probe already"):
        LatentAutoregressive(model.net, dim=DIM)
    built = LatentAutoregressive.from_config(model.config, ce_probe_module=nn.Linear(DIM, DIM))
    built.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    wanted = model.eval()(x)
    torch.manual_seed(0)
    close(built.eval()(x), wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frac_gradient": 2.0}, r"must lie in \[0, 1\]"),
        ({"predict_next_embed_with_action": False}, "or both"),
        ({"predictor_input_hiddens_index": 2}, "between -2 and 1"),
        ({"rollout_loss_weights": [0.0]}, "not all 0"),
    ],
)
def test_latent_autoregressive_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LatentAutoregressive(net(), dim=DIM, **options)
    with pytest.raises(InputError, match="cannot be given to the loss"):
        LatentAutoregressive(net(), dim=DIM)(ids(), return_mems=True)
