"""Direct preference optimization (2305.18290)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids, as_ids
from x_transformers.losses import next_token_log_probs, plus_aux_loss, reaching, run_with_aux_loss
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.unwrap import exchanges_gradients, unwrapped
from x_transformers.ops import masked_mean

__getattr__ = names_of(__name__)


class DPO(SavesFolders):
    """Training of a model to prefer one continuation over another, without drifting far from a frozen reference copy.

    Args:
        model: the policy; a frozen copy of it becomes the reference.
        beta: weight of preferences against the distance to the reference, above 0.
        pad_id: the id of padding after shorter sequences, which may lie outside of the vocabulary.

    Raises:
        ConfigError: if the model is not one that predicts the next token, or `beta` is not positive.
    """

    def __init__(self, model: TransformerWrapper, *, beta: float = 0.1, pad_id: int | None = None) -> None:
        super().__init__()
        net = unwrapped(model)
        if not isinstance(net, TransformerWrapper):
            raise ConfigError(
                f"`model` is a {type(net).__name__}; it must be a TransformerWrapper. Of a training wrapper, pass "
                "its `net`."
            )
        if not net.attn_layers.causal or net.to_logits is None or net.has_multiple_heads or net.pools:
            raise ConfigError(
                "`model` must predict the next token: a causal stack (a Decoder) with one head, and no pooling."
            )
        if not beta > 0:
            raise ConfigError(f"`beta` is {beta}; it must be above 0.")
        self.policy_model = model
        # compiled as the policy is; what is frozen needs no exchange of gradients, which cannot be copied either
        self.ref_model = copy.deepcopy(net if exchanges_gradients(model) else model)
        self.ref_model.requires_grad_(False)
        self.ref_model.eval()
        self.beta, self.pad_id = beta, pad_id

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the parameters that are trained: those of the policy.

        Args:
            recurse: as in `torch.nn.Module.parameters`.
        """
        return self.policy_model.parameters(recurse)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the policy; the reference stays in evaluation mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        self.ref_model.eval()
        return self

    @checked
    def forward(
        self,
        preferred_seq: Ids,
        unpreferred_seq: Ids,
        *,
        prompt_mask: Tensor,
        preferred_seq_mask: Tensor | None = None,
        unpreferred_seq_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss `mean_b -log sigmoid(beta * ((pi_w - pi_l) - (ref_w - ref_l)))`.

        `pi` and `ref` are the mean log-probabilities of the tokens of the response under policy and reference, for the
        preferred sequence (w) and the other (l). They are 0 for a response without tokens.

        Args:
            preferred_seq, unpreferred_seq: `(b, n)` ids, padded on the right.
            prompt_mask: `(b, n)` bool, True at the prompt, with which both sequences begin.
            preferred_seq_mask, unpreferred_seq_mask: `(b, n)` bool, False at padding; default True where the id is not
                `pad_id`. Masks of length n - 1 cover the predicted tokens, which are all but the first.

        Returns:
            A scalar.

        Raises:
            InputError: with what was given and what is needed.
        """
        preferred_seq, unpreferred_seq = (as_ids(seq, self, "a sequence") for seq in (preferred_seq, unpreferred_seq))
        if preferred_seq.ndim != 2 or preferred_seq.shape != unpreferred_seq.shape:
            raise ShapeError(
                f"the sequences have shapes {tuple(preferred_seq.shape)} and {tuple(unpreferred_seq.shape)}; both must "
                "be (b, n), the shorter ones padded on the right."
            )
        preferred_seq, unpreferred_seq = checked_ids(preferred_seq, self), checked_ids(unpreferred_seq, self)
        if preferred_seq.shape[1] < 2:
            raise ShapeError(f"the sequences have {preferred_seq.shape[1]} tokens; preferences need at least two.")
        preferred, counted_w = self._prepare(preferred_seq, prompt_mask, preferred_seq_mask, "preferred_seq_mask")
        other, counted_l = self._prepare(unpreferred_seq, prompt_mask, unpreferred_seq_mask, "unpreferred_seq_mask")
        counted = torch.cat((counted_w, counted_l))
        sequences = torch.cat((preferred, other))
        with torch.no_grad():
            self.ref_model.eval()
            reference, _ = _score(self.ref_model, sequences, counted)
        score, aux = _score(self.policy_model, sequences, counted)
        gain = score - reference
        preferred_gain, other_gain = gain.chunk(2)
        loss = plus_aux_loss(-F.logsigmoid(self.beta * (preferred_gain - other_gain)).mean(), aux)
        model = unwrapped(self.policy_model)
        return reaching(loss, model.attn_pool, model.to_next_embed_pred, model.exit_norms)

    def _prepare(self, seq: Tensor, prompt: Tensor, mask: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        """Return ids that the model can read, and `(b, n - 1)` bool, the predicted tokens of the response."""
        seq = seq.long()  # bytes could not be compared with a `pad_id` outside of their range
        # Position t of the output predicts token t + 1, so masks over tokens lose their first column: what counts is
        # whether the predicted token belongs to the response, even where the last token read belongs to the prompt.
        response = ~_of_targets(prompt, seq, "prompt_mask")
        if mask is not None:
            response = response & _of_targets(mask, seq, name)
        if self.pad_id is None:
            return seq, response
        padding = seq == self.pad_id
        if mask is None:
            response = response & ~padding[:, 1:]
        # padding is on the right of a causal row: no token that counts sees it, so that any valid id will do
        readable = 0 <= self.pad_id < unwrapped(self.policy_model).num_tokens
        return seq if readable else seq.masked_fill(padding, 0), response


def _of_targets(mask: Tensor, seq: Tensor, name: str) -> Tensor:
    """Return the part of a mask that covers predicted tokens."""
    batch, n = seq.shape
    if mask.is_floating_point() or mask.is_complex():
        raise InputError(f"`{name}` has dtype {mask.dtype}; it must be bool.")
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (n, n - 1):
        raise ShapeError(f"`{name}` has shape {tuple(mask.shape)}; it must be ({batch}, {n}).")
    mask = mask.bool().expand(batch, -1)
    return mask[:, 1:] if mask.shape[1] == n else mask


def log_prob_from_model_and_seq(model: TransformerWrapper, seq: Tensor) -> Tensor:
    """Return the log-probability of each token given those before it.

    Args:
        model: a causal model.
        seq: `(b, n)` ids.

    Returns:
        `(b, n - 1)`, for all tokens but the first.
    """
    return next_token_log_probs(model(seq[:, :-1]), seq[:, 1:])


def _score(model: TransformerWrapper, seq: Tensor, counted: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return `(b,)` the mean log-probability of the tokens that count, and the auxiliary loss, if there is one."""
    logits, aux = run_with_aux_loss(model, seq[:, :-1])
    log_probs = next_token_log_probs(logits, seq[:, 1:])
    # padding may have a log-probability of minus infinity, and its product with a mask of 0 would be NaN
    return masked_mean(log_probs.masked_fill(~counted, 0.0), counted), aux
