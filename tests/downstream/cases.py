"""A small model of each package that builds on `x_transformers`: a forward pass, a training step, sampling.

Run in the environment of `tests/downstream/__main__.py`, one process for each package:

    python tests/downstream/cases.py NAME

prints one JSON object: the result of each stage, "yes" or the last line of its traceback.
"""

import importlib.util
import json
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from packages import PACKAGES, STAGES
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
SAME = {"atol": 1e-4, "rtol": 1e-4}


@dataclass
class Usage:
    """What a user of a package does with its model.

    Args:
        model: the module that is trained.
        forward: a pass without gradients; its tensors must be finite.
        loss: the training loss. None if the package has its own trainer: `train` instead.
        sample: whatever the package generates; its tensors must be finite.
        train: runs the package's trainer and returns its losses.
    """

    model: nn.Module
    forward: Callable[[], Any]
    sample: Callable[[], Any]
    loss: Callable[[], Tensor] | None = None
    train: Callable[[], Any] | None = None


def genie2() -> Usage:
    """A world model of videos: its own rotary positions, value residuals and residual streams in a `Decoder`."""
    replace_module("imagen_pytorch", Imagen=nn.Module)  # imported for a type; it loads files from the network
    from genie2_pytorch import Genie2

    model = Genie2(
        dim=32,
        depth=2,
        heads=2,
        attn_dim_head=16,
        dim_latent=16,
        num_actions=4,
        num_meta_tokens=2,
        vq_codebook_size=16,
        latent_channel_first=True,
        is_video_enc_dec=True,
        cfg_train_action_dropout=0.0,
    )
    video, actions = torch.randn(2, 16, 3, 2, 2), torch.randint(0, 4, (2, 3))
    return Usage(
        model,
        forward=lambda: model(video, actions=actions),
        loss=lambda: model(video, actions=actions)[0],
        sample=lambda: model.generate(video[:, :, 0], num_frames=2),
    )


def midisimx() -> Usage:
    """Masked training of an `Encoder` whose keywords are looked up in the signature of `AttentionLayers`."""
    import x_transformers

    # The package has a modified copy of an old library, which the environment removes; ours has the same names.
    replace_module(
        "midisimx.x_transformer_2_3_1",
        TransformerWrapper=x_transformers.TransformerWrapper,
        Encoder=x_transformers.Encoder,
        predict_masked_tokens_iter=None,
        print_masked_predictions_ids=None,
    )
    from midisimx import get_embeddings_bf16
    from midisimx.train_encoder import _build_model, train_encoder

    sizes: dict[str, Any] = {"seq_len": 16, "model_dim": 32, "depth": 2, "heads": 2}
    model = _build_model(vocab_size=720, rotary_pos_emb=True, attn_flash=True, **sizes)
    assert model.attn_layers.rotary_pos_emb is not None, "the package found no keyword for rotary positions"
    songs = torch.randint(0, 700, (24, 12)).tolist()

    def train() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            trained, stats = train_encoder(
                songs,
                **sizes,
                mask_prob=0.5,
                num_epochs=2,
                batch_size=4,
                gradient_accumulate_every=2,
                learning_rate=1e-2,
                val_split=0.2,
                test_split=0.2,
                device="cpu",
                torch_compile=False,
                output_dir=folder,
                seed=0,
                verbose=False,
            )
        assert trained.attn_layers.rotary_pos_emb is not None, "trained without positions"
        changed = [not torch.equal(a, b) for a, b in zip(trained.parameters(), model.parameters(), strict=True)]
        assert all(changed), "parameters did not change"
        return torch.tensor(stats["train"]["step_losses"])

    return Usage(
        model,
        forward=lambda: model(torch.tensor(songs[:2]), mask=torch.ones(2, 12, dtype=torch.bool)),
        train=train,
        sample=lambda: get_embeddings_bf16(model, songs[:4], seq_len=16, device=torch.device("cpu")),
    )


def h_net() -> Usage:
    """Dynamic chunks: caches whose rows have different lengths, and whose keys are moved within `cached_kv`."""
    from h_net_dynamic_chunking.h_net import HNet

    from x_transformers import Decoder

    def stack(dim: int) -> Decoder:
        return Decoder(dim=dim, depth=1, heads=2, attn_dim_head=16, rotary_pos_emb=True, pre_norm_has_final_norm=False)

    inner = HNet(stack(48), stack(64), stack(48), dim=48, dim_inner=64)
    model = HNet(stack(32), inner, stack(32), dim=32, dim_inner=48, heads=2)
    tokens = torch.randn(3, 16, 32)

    def sample() -> Tensor:
        whole = model(tokens).output
        outputs, cache = [], None
        for token in tokens.split((7, *[1] * 9), dim=1):
            step = model(token, cache=cache, return_hiddens=True)
            outputs.append(step.output)
            cache = step.next_cache
        return same(torch.cat(outputs, dim=1), whole, "cached steps differ from one pass")

    def loss() -> Tensor:
        out = model(tokens, lens=torch.tensor([16, 12, 9]))
        return F.mse_loss(out.output, tokens) + out.loss

    return Usage(model, forward=lambda: model(tokens), loss=loss, sample=sample)


def metacontroller() -> Usage:
    """Polar positions in two stacks with a cache for each, and a controller between them."""
    from metacontroller.metacontroller import MetaController, Transformer

    sizes: dict[str, Any] = {"attn_dim_head": 16, "heads": 2, "depth": 1}
    model = Transformer(
        dim=32,
        action_embed_readout={"num_discrete": 4},
        state_embed_readout={"num_continuous": 8},
        lower_body=dict(sizes),
        upper_body=dict(sizes),
    )
    controller = MetaController(
        dim_model=32,
        dim_meta_controller=16,
        dim_latent=8,
        hypernetwork_low_rank=4,
        internal_sequence_embedder={**sizes, "polar_pos_emb": True},
        action_proposer={**sizes, "polar_pos_emb": True},
    )
    state, actions = torch.randn(2, 10, 8), torch.randint(0, 4, (2, 10))

    def loss() -> Tensor:
        cloned = model(state, actions, episode_lens=torch.tensor([10, 7]))
        discovered = model(state, actions, meta_controller=controller, discovery_phase=True)
        return sum(cloned) + discovered.action_recon + 0.1 * discovered.kl

    def sample() -> Any:
        whole, _ = model(state, actions, return_action_cache=True, force_behavior_cloning=True)
        steps, cache = [], None
        for i in range(10):
            past = actions[:, i - 1 : i] if i else None
            logits, cache = model(
                state[:, i : i + 1], past, cache=cache, return_cache=True, force_behavior_cloning=True
            )
            steps.append(logits)
        same(torch.cat(steps, dim=1), whole, "cached steps differ from one pass")
        chosen, cache = [], None
        for i in range(4):
            past = actions[:, i - 1 : i] if i else None
            logits, cache = model(state[:, i : i + 1], past, meta_controller=controller, cache=cache, return_cache=True)
            chosen.append(logits)
        return chosen

    return Usage(
        nn.ModuleList((model, controller)),
        forward=lambda: model(state, actions),
        loss=loss,
        sample=sample,
    )


def meshgpt() -> Usage:
    """Meshes in two stacks: a coarse one that is passed more than the new tokens, a fine one whose cache is cut."""
    from meshgpt_pytorch import MeshAutoencoder, MeshTransformer

    autoencoder = MeshAutoencoder(
        num_discrete_coors=16,
        encoder_dims_through_depth=(16, 16),
        init_decoder_conv_kernel=3,
        decoder_dims_through_depth=(16, 16),
        dim_codebook=8,
        codebook_size=16,
        use_linear_attn=False,
        attn_encoder_depth=1,
        attn_decoder_depth=1,
        local_attn_kwargs={"dim_head": 8, "heads": 2},
    )
    model = MeshTransformer(
        autoencoder,
        dim=32,
        max_seq_len=48,
        attn_depth=2,
        attn_dim_head=16,
        attn_heads=2,
        coarse_pre_gateloop_depth=1,
        fine_pre_gateloop_depth=1,
        fine_attn_depth=1,
    )
    codes = torch.randint(0, 16, (2, 36))

    def sample() -> Any:
        greedy: dict[str, Any] = {"batch_size": 2, "temperature": 0.0, "return_codes": True, "max_seq_len": 24}
        cached, plain = (model.generate(cache_kv=cache, **greedy) for cache in (True, False))
        same(cached, plain, "codes with and without cache differ")
        return model.generate(batch_size=1, max_seq_len=24)[0]

    return Usage(
        model,
        forward=lambda: model.forward_on_codes(codes, return_loss=False),
        loss=lambda: model.forward_on_codes(codes),
        sample=sample,
    )


def x_transformers_rl() -> Usage:
    """A world model over states with its own trainer; an agent that acts one cached step at a time."""
    import numpy as np
    from x_transformers_rl import Learner

    class Environment:
        def reset(self, seed: int | None = None) -> Any:
            return np.random.randn(5).astype(np.float32)

        def step(self, actions: Any) -> Any:
            return np.random.randn(5).astype(np.float32), 0.5, False

    folder = tempfile.mkdtemp()
    learner = Learner(
        state_dim=5,
        num_actions=2,
        reward_range=(-1.0, 1.0),
        max_timesteps=6,
        batch_size=2,
        num_episodes_per_update=4,
        epochs=1,
        world_model={"depth": 1, "attn_gate_values": True, "add_value_residual": True},
        agent_kwargs={"hidden_dim": 16, "save_path": f"{folder}/agent.pt"},
    )
    agent, states = learner.agent, torch.randn(6, 5).numpy()

    def forward() -> Any:
        sizes = torch.randn(2, 6, 5), torch.randint(0, 2, (2, 6))
        return agent.model(sizes[0], actions=sizes[1], rewards=torch.randn(2, 6), prev_action_dropout=False)[:4]

    def train() -> Any:
        before = [p.detach().clone() for p in agent.model.transformer.parameters()]
        learner(Environment(), 2)
        after = list(agent.model.transformer.parameters())
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert sum(changed) > len(changed) // 2, "parameters did not change"
        return after

    def sample() -> Any:
        model, given = agent.model, torch.from_numpy(states)[None]
        steps, cache = [], None
        for state in given.split(1, dim=1):
            action, *_, cache = model(state, cache=cache)
            steps.append(action)
        same(torch.cat(steps, dim=1), model(given)[0], "cached steps differ from one pass")
        actions, cache = [], None
        for state in states:
            action, cache = agent(state, hiddens=cache)
            actions.append(action)
        return actions

    return Usage(agent.model, forward=forward, train=train, sample=sample)


def declarative_attention() -> Usage:
    """Masks over keys that generated tags change from step to step."""
    from declarative_attention import DeclarativeAttentionWrapper

    from x_transformers import Decoder, TransformerWrapper

    def net(**kwargs: Any) -> TransformerWrapper:
        layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, **kwargs)
        return TransformerWrapper(num_tokens=128, max_seq_len=64, attn_layers=layers)

    models = nn.ModuleList(DeclarativeAttentionWrapper(net(**kw)) for kw in ({}, {"rotary_pos_emb": True}))
    spans, tokens = [(8, 16), (16, 24)], torch.randint(0, 128, (2, 32))
    prompt = tokens[:, :24]

    def sample() -> Any:
        greedy: dict[str, Any] = {"seq_len": 8, "chunk_spans": spans, "temperature": 0.0}
        for model in models:
            cached, plain = (model.generate(prompt, cache_kv=cache, **greedy) for cache in (True, False))
            same(cached, plain, "tokens with and without cache differ")
        return [model.generate(prompt, seq_len=8) for model in models]

    return Usage(
        models,
        forward=lambda: [model.net(tokens) for model in models],
        loss=lambda: sum(model(tokens, chunk_spans=spans, prompt_len=8) for model in models),
        sample=sample,
    )


def dreamer4() -> Usage:
    """A world model with a hierarchy of dynamic chunks over time, whose inner network is a `Decoder`."""
    from dreamer4 import DynamicsWorldModel, VideoTokenizer
    from dreamer4.dreamer4 import HierarchicalTemporalTransformer

    hierarchy: dict[str, Any] = {"depth": 1, "heads": 2, "dim_head": 16}
    sizes: dict[str, Any] = {"attn_heads": 2, "attn_dim_head": 16}
    tokenizer = VideoTokenizer(
        dim=32,
        dim_latent=8,
        patch_size=8,
        image_height=16,
        image_width=16,
        num_latent_tokens=2,
        encoder_depth=2,
        decoder_depth=2,
        time_block_every=2,
        lpips_loss_weight=0.0,
        h_net_layer=0,
        h_net_kwargs=hierarchy,
        **sizes,
    )
    world = DynamicsWorldModel(
        dim=32,
        dim_latent=8,
        video_tokenizer=tokenizer,
        num_discrete_actions=4,
        num_register_tokens=2,
        num_spatial_tokens=2,
        depth=2,
        time_block_every=2,
        multi_token_pred_len=2,
        transformer_kwargs={"h_net_layer": 0, "h_net_kwargs": hierarchy},
        **sizes,
    )
    video = torch.rand(2, 3, 4, 16, 16)
    taken: dict[str, Any] = {"discrete_actions": torch.randint(0, 4, (2, 4, 1)), "rewards": torch.randn(2, 4)}

    chunks, tokens = HierarchicalTemporalTransformer(32, **hierarchy).eval(), torch.randn(3, 8, 32)

    def sample() -> Tensor:
        steps, cache = [], None
        for token in tokens.split(1, dim=1):
            out, _, cache = chunks(token, cache=cache, return_hiddens=True)
            steps.append(out)
        same(torch.cat(steps, dim=1), chunks(tokens)[0], "cached steps differ from one pass")
        return world.generate(3, batch_size=2, return_decoded_video=True)

    return Usage(
        nn.ModuleList((tokenizer, world)),
        forward=lambda: tokenizer(video, return_latents=True),
        loss=lambda: tokenizer(video) + world(video=video, **taken),
        sample=sample,
    )


def mimic_video() -> Usage:
    """Actions from the hidden states of a video model, which a `ContinuousTransformerAutoencoder` summarizes."""
    from mimic_video import MimicVideo

    model = MimicVideo(
        32,
        dim_video_hidden=24,
        depth=2,
        heads=2,
        dim_head=16,
        action_chunk_len=4,
        dim_action=3,
        dim_joint_state=5,
        state_autoencoder={"enc_depth": 1, "dec_depth": 1, "max_seq_len": 16, "heads": 2, "attn_dim_head": 16},
    )
    video, state, actions = torch.randn(2, 12, 24), torch.randn(2, 5), torch.randn(2, 4, 3)
    given: dict[str, Any] = {"video_hiddens": [video] * 2, "joint_state": state}

    def sample() -> Any:
        return model.sample(steps=2, batch_size=2, return_rl_token=True, disable_progress_bar=True, **given)

    return Usage(
        model,
        forward=lambda: model(actions=actions, time=torch.tensor(0.5), **given),
        loss=lambda: model(actions=actions, **given),
        sample=sample,
    )


CASES: dict[str, Callable[[], Usage]] = {
    "genie2": genie2,
    "midisimx": midisimx,
    "h-net": h_net,
    "metacontroller": metacontroller,
    "meshgpt": meshgpt,
    "x-transformers-rl": x_transformers_rl,
    "declarative-attention": declarative_attention,
    "dreamer4": dreamer4,
    "mimic-video": mimic_video,
}


def replace_module(name: str, **names: Any) -> None:
    """Let `import name` find a module with these names only."""
    module = types.ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module


def define_operators_of_torchvision() -> None:
    """Define operators that torchvision's compiled part defines, if that part is built for another kind of PyTorch.

    The wheels of the package index need CUDA. The packages use transforms, which do not call these operators.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        for library in Path(found.origin).parent.glob("_C*"):
            torch.ops.load_library(str(library))
    except OSError:
        for name in ("nms", "qnms"):
            OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def same(a: Tensor, b: Tensor, message: str) -> Tensor:
    """Return `a`; raise AssertionError with `message` unless it equals `b`."""
    difference = (a.double() - b.double()).abs().max().item() if a.shape == b.shape else f"{a.shape} and {b.shape}"
    equal = a.shape == b.shape and torch.allclose(a.double(), b.double(), **SAME)
    assert equal, f"{message}: {difference}"
    return a


def require_finite(values: Any) -> None:
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    assert tensors, "no tensor came back"
    assert all(t.isfinite().all() for t in tensors if t.is_floating_point()), "numbers are not finite"


def training_step(usage: Usage) -> None:
    """Run one step of Adam; every gradient must be finite and parameters must change."""
    usage.model.train()
    if usage.train is not None:
        return require_finite(usage.train())
    assert usage.loss is not None
    parameters = [p for p in usage.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    loss = usage.loss()
    loss.backward()
    gradients = [p.grad for p in parameters if p.grad is not None]
    require_finite((loss, gradients))
    optimizer.step()
    changed = sum(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert changed > len(parameters) // 2, f"{changed} of {len(parameters)} parameters changed"
    return None


def stages(usage: Usage) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of each stage and what runs it."""

    def without_gradients(run: Callable[[], Any]) -> None:
        usage.model.eval()
        with torch.no_grad():
            require_finite(run())

    yield STAGES[0], lambda: without_gradients(usage.forward)
    yield STAGES[1], lambda: training_step(usage)
    yield STAGES[2], lambda: without_gradients(usage.sample)


def run(name: str) -> dict[str, str]:
    """Return the result of each stage of one package, and print tracebacks to stderr."""
    results = {}

    def attempt(stage: str, action: Callable[[], Any]) -> Any:
        torch.manual_seed(0)
        try:
            value = action()
        except Exception as error:
            traceback.print_exc()
            last = (str(error).strip().splitlines() or [""])[0]
            results[stage] = f"{type(error).__name__}: {last}"
            return None
        results[stage] = "yes"
        return value

    usage = attempt("construction", CASES[name])
    if usage is None:
        return dict.fromkeys(STAGES, results["construction"])
    del results["construction"]
    for stage, action in stages(usage):
        attempt(stage, action)
    return results


if __name__ == "__main__":
    import x_transformers

    checkout = Path(__file__).resolve().parents[2]
    assert x_transformers.__file__, "x_transformers is a folder without code"
    ours = Path(x_transformers.__file__).resolve()
    assert checkout in ours.parents, f"{ours} is not the library of {checkout}"
    assert set(CASES) == set(PACKAGES)
    define_operators_of_torchvision()
    print(json.dumps(run(sys.argv[1])))
