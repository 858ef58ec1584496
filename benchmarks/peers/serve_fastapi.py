"""FastAPI with a thread pool, a common way without a serving framework: one image a thread.

python benchmarks/peers/serve_fastapi.py 4100

A thread a core with one torch thread each; more would compete for the cores. torch releases the
GIL.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The peers' environment does not have the project installed.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import uvicorn
from fastapi import FastAPI, UploadFile  # type: ignore[import-not-found]

from benchmarks.peers.classifiers import Answer, load_classifier
from models.engine.processor import num_cpus

app = FastAPI()
classifier = load_classifier(num_threads=1)
threads = ThreadPoolExecutor(num_cpus())


@app.get("/health")  # type: ignore[untyped-decorator]
def health() -> str:
    return "ok"


@app.post("/predict")  # type: ignore[untyped-decorator]
async def predict(images: UploadFile) -> Answer:
    return await asyncio.get_running_loop().run_in_executor(threads, classify, await images.read())


def classify(data: bytes) -> Answer:
    return classifier.predict([classifier.decode(data)])[0]


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
