"""python post_requests.py URL IMAGE: a body, one of unknown length, a form; an answer in a line.

urllib3 below 1.25 gives a file name that is not ASCII as `filename*` alone.
"""

import sys
from pathlib import Path

import requests

url, path = sys.argv[1], Path(sys.argv[2])
image = path.read_bytes()
headers = {"Content-Type": "image/jpeg"}
with requests.Session() as session:
    print(session.post(url, data=image, headers=headers).text)
    print(session.post(url, data=iter([image[:999], image[999:]]), headers=headers).text)
    print(session.post(url, files={"images": (path.name, image)}).text)
