"""FastAPI with a thread pool, as people serve a model without a serving framework: one image a thread, no batches.

python benchmarks/peers/serve_fastapi.py 4100

A thread a core and one of torch's threads each: more only take the cores from one another. torch lets go of Python's lock while it works.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Run as a file, Python would look for modules in its own folder; the project's root is what is meant.
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
