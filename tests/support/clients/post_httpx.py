"""python post_httpx.py URL IMAGE: a body, one of unknown length, a form; an answer in a line.

With HTTP/2 where the package h2 is there: over plain TCP it is HTTP/1.1 all the same.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import httpx

url, path = sys.argv[1], Path(sys.argv[2])
image = path.read_bytes()
headers = {"Content-Type": "image/jpeg"}
with httpx.Client(http2=find_spec("h2") is not None, trust_env=False, timeout=30) as client:
    print(client.post(url, content=image, headers=headers).text)
    print(client.post(url, content=iter([image[:999], image[999:]]), headers=headers).text)
    print(client.post(url, files={"images": (path.name, image)}).text)
