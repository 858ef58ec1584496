"""python post_triton.py URL IMAGE: binary, JSON, and both compressed; the label in a line each.

URL is of /predict; tritonclient takes the host and the port of it.
"""

import json
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient(urlsplit(sys.argv[1]).netloc)
image = Path(sys.argv[2]).read_bytes()
for compression in (None, "gzip", "deflate"):
    tensor = triton.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([image], np.object_))
    result = client.infer("colors", [tensor], request_compression_algorithm=compression)
    label = result.as_numpy("label")[0].decode()
    print(json.dumps({"predictions": [{"label": label}]}))
