"""Serve a trained language model over HTTP until it is interrupted.

A request has texts to continue, `prompts`, and may have a `length` in tokens (64) and a `temperature` (0.8). The answer
has their continuations, without the prompts. The prompts of a request are one batch, and requests wait for each other.
With `"stream": true`, a single prompt is continued in plain text that is sent while it is written:

    python examples/serve.py runs/train_text
    curl localhost:8000 -d '{"prompts": ["def ", "class "], "length": 64, "temperature": 0.5}'
    curl -N localhost:8000 -d '{"prompts": ["import "], "stream": true}'
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from x_transformers.training.generate import decoded
from x_transformers.training.refusals import one_sentence
from x_transformers.training.trained import PLACES, language_model, local_place, tokenizer_of


class Server(ThreadingHTTPServer):
    """A server of one model, which runs one batch at a time."""

    def __init__(self, place: Path, address: tuple[str, int], device: str = "cpu"):
        self.model = language_model(place, device)
        self.tokenizer = tokenizer_of(place, self.model.net.num_tokens)
        self.device, self.turn = device, threading.Lock()
        super().__init__(address, Handler)

    def encoded(self, prompts: Any) -> list[torch.Tensor]:
        """Return the ids of texts."""
        if not (isinstance(prompts, list) and prompts and all(isinstance(text, str) and text for text in prompts)):
            raise ValueError('`prompts` must be a list of texts that are not empty, as in {"prompts": ["def "]}.')
        rows = (self.tokenizer.prompt(text.encode()) for text in prompts)
        return [torch.tensor(ids, device=self.device) for ids in rows]

    def options(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of generation."""
        options = {"seq_len": request.get("length", 64), "temperature": request.get("temperature", 0.8)}
        return {**options, "eos_token": self.tokenizer.end, "filter_logits_fn": "min_p"}

    def continued(self, request: dict[str, Any]) -> list[str]:
        """Return the continuations of all prompts."""
        prompts = self.encoded(request.get("prompts"))
        with self.turn:
            rows = self.model.generate(prompts, **self.options(request)).tolist()
        end = self.tokenizer.end
        return [self.tokenizer.decode(row[: row.index(end)] if end in row else row) for row in rows]

    def streamed(self, request: dict[str, Any]) -> Iterator[str]:
        """Yield the continuation of a prompt in pieces."""
        prompts = self.encoded(request.get("prompts"))
        if len(prompts) > 1:
            raise ValueError(f"{len(prompts)} prompts cannot be one stream; send a request for each, or drop `stream`.")
        with self.turn:
            new = (int(token) for token in self.model.stream(prompts[0][None], **self.options(request)))
            pieces = decoded(self.tokenizer, prompts[0].tolist(), new)
            next(pieces)  # the prompt
            yield from pieces


def read_request(body: bytes) -> dict[str, Any]:
    """Return the fields of a request."""
    try:
        request = json.loads(body)
    except ValueError:
        request = None
    if not isinstance(request, dict):
        raise ValueError('a request is an object in JSON, as {"prompts": ["def "], "length": 64}.')
    unknown = sorted(request.keys() - {"prompts", "length", "temperature", "stream"})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; a request has prompts, length, temperature, stream.")
    return request


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server

    def do_POST(self) -> None:
        try:
            request = read_request(self.rfile.read(int(self.headers["Content-Length"] or 0)))
            if request.get("stream"):
                self.send_pieces(self.server.streamed(request))
                return
            status, answer = 200, {"texts": self.server.continued(request)}
        except (ValueError, TypeError) as error:
            status, answer = 400, {"error": str(error)}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_pieces(self, pieces: Iterator[str]) -> None:
        first = next(pieces, "")  # a bad request fails here, before anything is sent
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        self.wfile.write(first.encode())
        for piece in pieces:
            self.wfile.write(piece.encode())
            self.wfile.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options] MODEL"
    )
    parser.add_argument("model", help=PLACES)
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1, which only this machine reaches")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--device", default="cpu", help="default cpu")
    options = parser.parse_args()
    with one_sentence():
        server = Server(local_place(options.model), (options.host, options.port), options.device)
    with server:
        print(f"serving {options.model} at http://{options.host}:{server.server_port}; Ctrl+C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    main()
