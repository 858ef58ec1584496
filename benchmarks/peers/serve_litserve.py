"""LitServe as its documentation writes it: decode_request, predict on a batch, encode_response.

python benchmarks/peers/serve_litserve.py 4100
"""

import sys
from pathlib import Path
from typing import Any

# The peers' environment does not have the project installed.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import litserve  # type: ignore[import-not-found]
from starlette.requests import Request

from benchmarks.peers.classifiers import (
    MAX_BATCH_SIZE,
    NUM_WORKERS,
    THREADS_PER_WORKER,
    Answer,
    load_classifier,
)


class ClassifyAPI(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self._classifier = load_classifier(num_threads=THREADS_PER_WORKER)

    def decode_request(self, request: Request) -> Any:
        return self._classifier.decode(request["images"].file.read())

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, inputs: list[Any]) -> list[Answer]:
        return self._classifier.predict(inputs)

    def unbatch(self, output: list[Answer]) -> list[Answer]:
        return output

    def encode_response(self, output: Answer) -> Answer:
        return output


if __name__ == "__main__":
    api = ClassifyAPI(max_batch_size=MAX_BATCH_SIZE, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=NUM_WORKERS, timeout=60)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning"
    )
