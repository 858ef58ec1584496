"""python post_aiohttp.py URL IMAGE: a body, one of unknown length, compressed, a form; an answer in
a line."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

url, path = sys.argv[1], Path(sys.argv[2])
image = path.read_bytes()
headers = {"Content-Type": "image/jpeg"}


async def pieces() -> AsyncIterator[bytes]:
    yield image[:999]
    yield image[999:]


async def main() -> None:
    form = aiohttp.FormData()
    form.add_field("images", image, filename=path.name)
    async with aiohttp.ClientSession() as session:
        for answer in (
            session.post(url, data=image, headers=headers),
            session.post(url, data=pieces(), headers=headers),
            session.post(url, data=image, headers=headers, compress="gzip"),
            session.post(url, data=image, headers=headers, compress="deflate"),
            session.post(url, data=image, headers=headers, expect100=True),
            session.post(url, data=form),
        ):
            async with answer as response:
                print(await response.text())


asyncio.run(main())
