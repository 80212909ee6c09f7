"""llama.cpp's own HTTP server on a GGUF file, for `gemify bench peers`. Runs where xllamacpp is; imports no gemify.

``python llama_cpp_server.py --gguf FILE --port N``: chats and mean-pooled embeddings, a slot for each client.
"""

from __future__ import annotations

import argparse
import os
import signal


def main() -> None:
    """Serve until SIGTERM."""
    import xllamacpp

    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024, help="Tokens of a slot.")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])  # taken below, by this thread
    settings = xllamacpp.CommonParams()
    settings.model.path = arguments.gguf
    settings.model_alias = {"bench"}
    settings.n_parallel, settings.n_ctx = arguments.slots, arguments.context * arguments.slots
    settings.n_batch = settings.n_ubatch = 2048
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(os.environ["OMP_NUM_THREADS"])
    settings.embedding, settings.warmup, settings.verbosity = True, True, 0
    settings.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    settings.port, settings.hostnames = arguments.port, ["127.0.0.1"]
    server = xllamacpp.Server(settings)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    os._exit(0)


if __name__ == "__main__":
    main()
