"""HTTP and gRPC in front of the stand-in for a Triton server, as much of both as the deployed clients speak."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import grpc
import numpy as np
from triton_server import RequestError, Server, Tensors
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, serialize_byte_tensor, triton_to_np_dtype


@contextmanager
def serve(server: Server) -> Iterator[tuple[str, str]]:
    """Yields the addresses of HTTP and gRPC."""
    grpc_server = grpc.server(futures.ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Grpc(server), grpc_server)
    grpc_port = grpc_server.add_insecure_port("localhost:0")
    grpc_server.start()
    http_server = ThreadingHTTPServer(("localhost", 0), _http_handler(server))
    Thread(target=http_server.serve_forever, daemon=True).start()
    try:
        yield f"localhost:{http_server.server_port}", f"localhost:{grpc_port}"
    finally:
        http_server.shutdown()
        http_server.server_close()
        grpc_server.stop(0).wait()


class _Grpc(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, server: Server) -> None:
        self._server = server

    def ModelInfer(self, request: Any, context: Any) -> Any:
        try:
            parameters = request.parameters
            found = self._server.infer(
                request.model_name,
                _read(request),
                parameters["sequence_id"].int64_param,
                parameters["sequence_start"].bool_param,
                parameters["sequence_end"].bool_param,
            )
        except RequestError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        wanted = [output.name for output in request.outputs] or list(found)
        return _write(request, {name: found[name] for name in wanted})

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
        try:
            for request in requests:
                yield from self._answers(request)
        except grpc.RpcError:
            self._server.cancelled_streams += 1
            raise

    def _answers(self, request: Any) -> Iterator[Any]:
        try:
            for found in self._server.stream(request.model_name, _read(request)):
                answer = _write(request, found)
                answer.parameters["triton_final_response"].bool_param = False
                yield service_pb2.ModelStreamInferResponse(infer_response=answer)
        except RequestError as error:
            yield service_pb2.ModelStreamInferResponse(error_message=str(error))
        last = _write(request, {})
        last.parameters["triton_final_response"].bool_param = True
        yield service_pb2.ModelStreamInferResponse(infer_response=last)


def _read(request: Any) -> Tensors:
    tensors = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            array = deserialize_bytes_tensor(raw)
        else:
            array = np.frombuffer(raw, triton_to_np_dtype(tensor.datatype))
        tensors[tensor.name] = array.reshape(tuple(tensor.shape))
    return tensors


def _write(request: Any, tensors: Tensors) -> Any:
    answer = service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
    for name, array in tensors.items():
        answer.outputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        text = array.dtype == np.object_
        answer.raw_output_contents.append(serialize_byte_tensor(array).item() if text else array.tobytes())
    return answer


def _http_handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            _, version, models, name, action = self.path.split("/")
            assert (version, models) == ("v2", "models")
            fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self._send(_ACTIONS[action](server, name, fields))
            except RequestError as error:
                self._send(json.dumps({"error": str(error)}), 400)

        def _send(self, text: str, status: int = 200) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    return Handler


def _infer(server: Server, name: str, fields: dict[str, Any]) -> str:
    inputs = {}
    for tensor in fields["inputs"]:
        kind = np.dtype(triton_to_np_dtype(tensor["datatype"]))
        data = [text.encode() for text in tensor["data"]] if kind == np.object_ else tensor["data"]
        inputs[tensor["name"]] = np.array(data, kind).reshape(tensor["shape"])
    given = fields.get("parameters", {})
    found = server.infer(
        name, inputs, given.get("sequence_id", 0), given.get("sequence_start", False), given.get("sequence_end", False)
    )
    wanted = [output["name"] for output in fields.get("outputs", [])] or list(found)
    outputs = [{"name": n, "shape": found[n].shape, "data": found[n].ravel().tolist()} for n in wanted]
    return json.dumps({"model_name": name, "outputs": outputs})


def _generated(server: Server, name: str, fields: dict[str, Any]) -> list[str]:
    kinds = {"text_input": np.object_, "max_tokens": np.int32, "stream": np.bool_}
    inputs = {
        key: np.array([value.encode() if isinstance(value, str) else value], kinds[key])
        for key, value in fields.items()
    }
    return [
        json.dumps({"model_name": name, "text_output": answer["text_output"][0].decode()})
        for answer in server.stream(name, inputs)
    ]


def _generate(server: Server, name: str, fields: dict[str, Any]) -> str:
    answers = _generated(server, name, fields)
    if len(answers) != 1:
        raise RequestError(f"generate expects model to produce exactly 1 response, got {len(answers)}")
    return answers[0]


def _stream(server: Server, name: str, fields: dict[str, Any]) -> str:
    return "".join(f"data: {answer}\n\n" for answer in _generated(server, name, fields))


_ACTIONS = {"infer": _infer, "generate": _generate, "generate_stream": _stream}
