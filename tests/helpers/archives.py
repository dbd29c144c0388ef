"A small model and its archive, and what a folder holds."
import json, os
from pathlib import Path

import pytest

from colab_gpt2.storage.archives import archive_model


def tree(folder):
    "name -> content of all the files below `folder`; a temporary that was left would show."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def make_model(folder, size=200_000):
    "A folder with a model; its weights have `size` bytes, the first MB of which is random and does not shrink."
    folder.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(folder/"model.safetensors", "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.write(os.urandom(min(size, 1 << 20)))
        f.truncate(8 + len(header) + size)
    (folder/"config.json").write_text("{}")
    return folder


@pytest.fixture
def model(tmp_path): return make_model(tmp_path/"output")


@pytest.fixture
def archive(model, tmp_path): return archive_model(model, tmp_path/"gpt2-tuned.tar.gz", progress=False)
