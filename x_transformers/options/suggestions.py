"""Suggestions for keywords that are unknown: names of other libraries, owners, and the most similar name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Ours:
    """Our names for another library's keyword.

    Attributes:
        names: names of ours, of which the first one that is known is meant.
        advice: sentence that says more than the name, or None. It is appropriate where one of the names is known; with
            no names, anywhere.
    """

    names: tuple[str, ...] = ()
    advice: str | None = None


def _table(*rows: tuple[str, Ours]) -> dict[str, list[Ours]]:
    table: dict[str, list[Ours]] = {}
    for names, ours in rows:
        for name in names.split():
            table.setdefault(name, []).append(ours)
    return table


def _filter(name: str, keywords: str) -> Ours:
    return Ours(
        ("filter_logits_fn",),
        f'Filters are chosen by name: `filter_logits_fn = "{name}", filter_kwargs = {{{keywords}}}`.',
    )


OTHER_LIBRARIES = _table(
    # sizes of a stack
    ("d_model dim_model n_embd n_embed hidden_size hidden_dim embed_dim embedding_dim model_dim width", Ours(("dim",))),
    ("n_layer n_layers num_layers num_hidden_layers num_blocks n_blocks layers", Ours(("depth",))),
    ("n_head n_heads num_heads num_attention_heads nhead attn_heads num_query_heads", Ours(("heads",))),
    (
        "kv_heads n_kv_head n_kv_heads num_kv_heads num_key_value_heads num_query_groups",
        Ours(("attn_kv_heads", "kv_heads")),
    ),
    ("dim_head head_dim d_head head_size d_kv d_k", Ours(("attn_dim_head", "dim_head"))),
    (
        "d_ff d_ffn ff_dim ffn_dim ffn_hidden_size dim_feedforward intermediate_size dim_hidden mlp_dim mlp_ratio "
        "ff_inner_dim",
        Ours(("ff_mult", "mult"), "The hidden width of a feedforward is `{0}` times `dim`."),
    ),
    # parts of a stack
    (
        "dropout dropout_p dropout_rate resid_pdrop hidden_dropout hidden_dropout_prob",
        Ours(
            ("attn_dropout", "emb_dropout"),
            "Each part has its own: `attn_dropout` and `ff_dropout` of the stack, `emb_dropout` of the model.",
        ),
    ),
    ("attn_pdrop attention_dropout attention_probs_dropout_prob attn_drop", Ours(("attn_dropout", "dropout"))),
    ("embd_pdrop embd_dropout embedding_dropout pos_drop", Ours(("emb_dropout",))),
    ("drop_path drop_path_rate stochastic_depth layerdrop", Ours(("layer_dropout",))),
    ("rope use_rope rotary use_rotary rotary_emb rotary_embedding rotary_embeddings", Ours(("rotary_pos_emb",))),
    ("rope_theta rope_base rotary_base rotary_emb_base", Ours(("rotary_base_rescale_factor",))),
    ("alibi use_alibi", Ours(("alibi_pos_bias",))),
    ("norm_first prenorm", Ours(("pre_norm",))),
    ("rmsnorm rms_norm", Ours(("use_rmsnorm",))),
    ("flash flash_attn flash_attention use_flash use_flash_attn use_flash_attention", Ours(("attn_flash", "flash"))),
    ("window window_size sliding_window attention_window local_attn_window_size", Ours(("attn_max_attend_past",))),
    ("gradient_checkpointing use_checkpoint activation_checkpointing checkpointing", Ours(("checkpoint_every",))),
    (
        "activation hidden_act hidden_activation act_fn activation_function",
        Ours(
            ("ff_custom_activation",),
            "Activations have keywords of their own: `ff_glu`, `ff_swish`, `ff_relu_squared`, `ff_custom_activation`.",
        ),
    ),
    ("swiglu use_swiglu", Ours(("ff_glu",), "It is `ff_glu = True` with `ff_swish = True`.")),
    ("bias use_bias qkv_bias attention_bias add_bias", Ours(("attn_qkv_bias", "qkv_bias"))),
    ("is_causal", Ours(("causal",))),
    # models
    ("vocab_size n_vocab num_embeddings vocabulary_size", Ours(("num_tokens",))),
    (
        "block_size context_length context_size max_position_embeddings n_positions n_ctx max_seq_length "
        "max_sequence_length",
        Ours(("max_seq_len",)),
    ),
    ("tie_word_embeddings tie_weights tie_embeddings weight_tying share_embeddings", Ours(("tie_embedding",))),
    ("encoder decoder transformer stack layers attention_layers", Ours(("attn_layers", "net"))),
    ("model network module transformer", Ours(("net", "model"))),
    ("pad_token_id pad_id pad_idx padding_idx pad_token", Ours(("pad_value", "pad_id"))),
    ("ignore_id", Ours(("ignore_index",))),
    # passes
    (
        "input_ids inputs input tokens ids token_ids idx hidden_states src prompt prompts start_tokens seq x",
        Ours(("x", "prompts", "start_tokens", "seq", "seq_in", "src")),
    ),
    ("pixel_values images image", Ours(("img",))),
    (
        "attention_mask padding_mask pad_mask key_padding_mask src_key_padding_mask tgt_key_padding_mask",
        Ours(("mask",), "It is `mask` here, True for valid tokens."),
    ),
    ("src_mask tgt_mask attn_masks", Ours(("attn_mask",), "It is `attn_mask` here, True where a query may see a key.")),
    ("encoder_hidden_states memory encoder_outputs cond_emb", Ours(("context", "condition"))),
    ("encoder_attention_mask memory_key_padding_mask memory_mask", Ours(("context_mask",))),
    ("position_ids positions input_pos cache_position", Ours(("pos",))),
    ("inputs_embeds input_embeds embeds", Ours(("prepend_embeds",))),
    ("past_key_values past_key_value kv_cache past cache_params", Ours(("cache",))),
    (
        "use_cache",
        Ours(
            ("cache_kv", "return_intermediates", "return_hiddens"),
            "It is `{0}` here; a later call takes the cache of a pass as `cache`.",
        ),
    ),
    ("output_hidden_states return_hidden_states", Ours(("return_intermediates", "return_hiddens"))),
    ("output_attentions return_attention need_weights return_attn_weights", Ours(("return_attn", "return_hiddens"))),
    ("num_logits_to_keep", Ours(("logits_to_keep",))),
    (
        "labels label targets target",
        Ours(
            advice="A training wrapper such as `AutoregressiveWrapper` takes its targets from `x`; drop it, and set "
            "tokens that do not count to `ignore_index`."
        ),
    ),
    ("return_dict", Ours(advice="Outputs are tensors and tuples; drop it.")),
    # generation
    (
        "max_new_tokens max_length max_tokens max_len max_gen_len n_tokens num_steps length",
        Ours(("seq_len", "max_seq_len")),
    ),
    ("eos_token_id eos_id eos end_token stop_token stop_token_id end_id", Ours(("eos_token",))),
    ("num_beams beam_size beam_width n_beams", Ours(("beams",))),
    ("top_p", _filter("top_p", '"thres": 0.9')),
    ("top_k", _filter("top_k", '"k": 50')),
    ("min_p", _filter("min_p", '"min_p": 0.1')),
    ("top_a filter_thres thres", _filter("top_a", '"min_p_ratio": 0.02')),
    ("do_sample sample greedy", Ours(("temperature",), "Tokens are drawn unless `temperature = 0`.")),
    ("num_return_sequences num_samples n", Ours(("prompts", "start_tokens"), "Repeat the prompts instead.")),
    ("streamer", Ours(("prompts", "start_tokens"), "Tokens come one by one from `stream`.")),
    ("seed generator rng", Ours(advice="Draws follow `torch.manual_seed`.")),
    ("assistant_model draft", Ours(("draft_model",))),
)
"""Keywords of other libraries, which people write by habit."""

METHODS = ("forward", "generate", "stream", "beam_search")
PREFIXES = ("attn_", "ff_")
FIRST = ("Decoder", "TransformerWrapper", "AutoregressiveWrapper")
"""Owners that are named first; others follow in the order in which they are defined."""

_public: dict[str, type] = {}


def offer(cls: type) -> None:
    """Let suggestions name a class and its methods as owners of keywords."""
    _public[cls.__name__] = cls


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question that suggests the most similar known name, or an empty string if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean `{near[0]}`?" if near else ""


def suggestion(name: str, known: Iterable[str], *, call: type | None = None) -> str:
    """Return a sentence about what to write instead of an unknown keyword, or an empty string if nothing is similar.

    Args:
        name: the keyword.
        known: the keywords of what was called.
        call: the class of which a method was called; None for constructors.
    """
    known = set(known)
    here = _in_other_words(name, known)
    if here is not None:
        return f" It is {here} here." if here.startswith("`") else f" {here}"
    owners = [(words, names) for words, names in _owners(call) if known != set(names)]
    for words, names in owners:
        if name in names:
            return f" It belongs to {words}."
        there = _in_other_words(name, names)
        if there is not None:
            return f" It is {there} of {words}." if there.startswith("`") else f" {there} See {words}."
    return _nearest(name, known, owners)


def _in_other_words(name: str, known: Collection[str]) -> str | None:
    """Return the known names for another library's keyword, or for one without its prefix, or a sentence about it."""
    for ours in OTHER_LIBRARIES.get(name, ()):
        found = next((each for each in ours.names if each in known), None)
        if found is not None:
            return f"`{found}`" if ours.advice is None else ours.advice.replace("{0}", found)
        if ours.advice is not None and not ours.names:
            return ours.advice
    return " or ".join(f"`{prefix}{name}`" for prefix in PREFIXES if prefix + name in known) or None


def _nearest(name: str, known: Collection[str], owners: Iterable[tuple[str, Collection[str]]]) -> str:
    """Return a question about the most similar name: a known one, unless one of another owner is almost the same."""
    here = did_you_mean(name, known)
    similarity = max((_similarity(name, each) for each in known), default=0.0) if here else 0.0
    for words, names in owners:
        near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.85)
        if near and _similarity(name, near[0]) > similarity:
            return f" Did you mean `{near[0]}` of {words}?"
    return here


def _similarity(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, other, one).ratio()


def _owners(call: type | None) -> Iterator[tuple[str, Collection[str]]]:
    """Yield everything that has keywords, in words, with their names; what is closest comes first."""
    own = [] if call is None else [cls for cls in call.__mro__ if cls.__name__ in _public]
    ordered = [*own, *(_public[name] for name in FIRST if name in _public), *_public.values()]
    for cls in dict.fromkeys(ordered):
        constructor = (f"the {cls.__name__}", inspect.signature(cls).parameters)
        methods = [
            (f"`{cls.__name__}.{name}`", inspect.signature(vars(cls)[name]).parameters)
            for name in METHODS
            if name in vars(cls)
        ]
        yield from [*methods, constructor] if call is not None else [constructor, *methods]
