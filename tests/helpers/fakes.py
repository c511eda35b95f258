"""Servers in a thread that answer as llama.cpp, vLLM, SGLang or another one would, with known texts."""

import contextlib
import dataclasses
import http.server
import json
import threading
from collections.abc import Callable
from typing import Any

from ppow_jax.targets import markov
from ppow_jax.targets.tokenizer import Tokenizer

DRAFTED, ACCEPTED, PASSES = 6, 3, 2  # of every answer of a server with a drafter


@dataclasses.dataclass
class Fake:
    """A server of a Markov chain.

    Attributes:
      kind: llamacpp, vllm, sglang, or anything else.
      writes: prompt ids and a number of tokens to the ids that it writes, without the one that ends a text,
        and whether it ended there.
      drafts: whether it counts drafts.
      before: called with each request's path and body; what it returns, if anything, is the status and the
        answer.
    """

    kind: str
    writes: Callable[[list[int], int], tuple[list[int], bool]]
    drafts: bool = True
    before: Callable[[str, Any], tuple[int, Any] | None] = lambda path, body: None
    model: str = "markov"
    requests: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def __enter__(self) -> "Fake":
        fake = self
        self.tokenizer: Tokenizer = markov.build(0, "float32")[2]
        self._lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self._answer(None)

            def do_POST(self):
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body):
                with fake._lock:
                    fake.requests.append((self.path, body))
                    fake.headers.append(dict(self.headers))
                status, answer = fake.before(self.path, body) or fake.answer(self.path, body)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", fake.url + "/elsewhere")
                self.send_header("Content-Length", str(len(content)))
                with contextlib.suppress(ConnectionError):  # who asked may be gone: it waits no longer
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self) -> list[Any]:
        """The bodies of all questions."""
        return [body for _, body in self.requests if body is not None]

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": self.model, "owned_by": self.kind}]}
        if path == "/v1/chat/completions":
            return 200, self._chat(body)
        if (self.kind, path) == ("llamacpp", "/completion"):
            return 200, self._llamacpp(body)
        if (self.kind, path) == ("vllm", "/v1/completions"):
            return 200, self._vllm(body)
        if (self.kind, path) == ("vllm", "/metrics"):
            return 200, self._metrics()
        if (self.kind, path) == ("sglang", "/generate"):
            return 200, self._sglang(body)
        if (self.kind, path) == ("sglang", "/get_server_info"):
            return 200, {"internal_states": [{"avg_spec_accept_length": 2.25}]}
        return 404, {"error": {"message": f"no {path} here"}}

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, special=False)

    def _chat(self, body: Any) -> dict:
        prompt = self.tokenizer.encode(self.tokenizer.render(body["messages"]))
        ids, finished = self.writes(prompt, body["max_tokens"])
        choice = {"message": {"role": "assistant", "content": self._text(ids)}}
        choice["finish_reason"] = "stop" if finished else "length"
        found = {"choices": [choice], "usage": {"completion_tokens": len(ids) + finished}}
        if self.kind == "llamacpp":
            drafts = {"draft_n": DRAFTED, "draft_n_accepted": ACCEPTED} if self.drafts else {}
            found["timings"] = {"predicted_ms": 1.0} | drafts
        if self.kind == "sglang" and self.drafts and body.get("return_meta_info"):
            choice["meta_info"] = {"spec_verify_ct": PASSES, "spec_num_correct_drafts": ACCEPTED}
            choice["meta_info"]["spec_num_proposed_drafts"] = DRAFTED
        return found

    def _llamacpp(self, body: Any) -> dict:
        ids, finished = self.writes(body["prompt"], body["n_predict"])
        end = [self.tokenizer.stop_ids[0]] * finished
        about = {"stop_type": "eos" if finished else "limit", "tokens_predicted": len(ids + end)}
        return {"content": self._text(ids), "tokens": ids + end if body["return_tokens"] else []} | about

    def _vllm(self, body: Any) -> dict:
        ids, finished = self.writes(body["prompt"], body["max_tokens"])
        end = [self.tokenizer.stop_ids[0]] * finished
        choice = {"text": self._text(ids), "finish_reason": "stop" if finished else "length"}
        choice |= {"token_ids": ids + end} if body.get("return_token_ids") else {}
        return {"choices": [choice], "usage": {"completion_tokens": len(ids + end)}}

    def _sglang(self, body: Any) -> dict:
        ids, finished = self.writes(body["input_ids"], body["sampling_params"]["max_new_tokens"])
        about = {"finish_reason": {"type": "stop" if finished else "length"}}
        about["completion_tokens"] = len(ids) + finished
        return {"text": self._text(ids), "output_ids": ids, "meta_info": about}

    def _metrics(self) -> bytes:
        answers = sum(path == "/v1/chat/completions" for path, _ in self.requests)
        if not self.drafts:
            return b"vllm:num_requests_running 0.0\n"
        name, half = "vllm:spec_decode_num_", '{engine="0",model_name="m"}'
        lines = [f"# TYPE {name}drafts counter", f"{name}drafts_created{half} 1.7e9"]
        for what, count in (("drafts", PASSES), ("draft_tokens", DRAFTED), ("accepted_tokens", ACCEPTED)):
            lines += [f"{name}{what}_total{half} {count * answers + 100}.0"]
            lines += [f'{name}{what}_total{{engine="1",model_name="m"}} 7']
        for place, count in enumerate((2, 1, 0)):
            where = f'{{engine="0",model_name="m",position="{place}"}}'
            lines += [f"{name}accepted_tokens_per_pos_total{where} {count * answers + 50}"]
        return "\n".join(lines).encode()
