"""The requests for the adapters of a shelf, to the stand-in for Triton."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from shelves import COUNT, NAMES, PROMPTS
from triton_server import RequestError, Server


def ask_all(server: Server) -> list[list[int]]:
    """The tokens that `m_text` answers each of `PROMPTS` with, by its adapter of `NAMES`; four at a time."""

    def ask(i: int) -> list[int]:
        given = {"input_ids": np.array([PROMPTS[i]]), "max_tokens": np.array([[COUNT]], np.int32)}
        if NAMES[i] is not None:
            given["adapter"] = np.array([[NAMES[i].encode()]], np.object_)
        (answer,) = server.stream("m_text", given)
        return answer["token_ids"][0].tolist()

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, range(len(PROMPTS))))


def assert_refuses_an_unknown_one(server: Server) -> None:
    unknown = {"input_ids": np.array([[5]]), "adapter": np.array([[b"nobody"]], np.object_)}
    with pytest.raises(RequestError, match="INVALID_ARG: There is no adapter 'nobody'"):
        list(server.stream("m_text", unknown))
