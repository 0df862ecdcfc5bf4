"""llama.cpp through the low-level interface of llama-cpp-python: MODEL REPACK(0|1) THREADS PROMPT NEW WARM_UP(0|1)."""

import ctypes
import sys

import llama_cpp.llama_cpp as lib
from common import join_groups, measure

model_path = sys.argv[1]
repack, threads, prompt, new, warm_up = map(int, sys.argv[2:7])
state = {"token": 5}


def decode(tokens):
    array = (ctypes.c_int32 * len(tokens))(*tokens)
    code = lib.llama_decode(state["context"], lib.llama_batch_get_one(array, len(tokens)))
    if code != 0:
        raise SystemExit(f"llama_decode failed: {code}")
    # Waits for the logits.
    lib.llama_get_logits_ith(state["context"], -1)


def load():
    parameters = lib.llama_model_default_params()
    parameters.use_extra_bufts = bool(repack)
    parameters.n_gpu_layers = 0
    state["model"] = lib.llama_model_load_from_file(model_path.encode(), parameters)
    if not state["model"]:
        raise SystemExit(f"{model_path}: llama.cpp cannot load it")
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = 1024
    parameters.n_batch = parameters.n_ubatch = 512
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.no_perf = True
    state["context"] = lib.llama_init_from_model(state["model"], parameters)
    state["vocabulary"] = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(state["model"]))


def prefill(tokens):
    lib.llama_memory_clear(lib.llama_get_memory(state["context"]), True)
    decode(tokens)


def step():
    # Any token costs the same: no time is lost over choosing one.
    state["token"] = (state["token"] * 31 + 7) % state["vocabulary"]
    decode([state["token"]])


silent = lib.llama_log_callback(lambda level, text, data: None)
lib.llama_log_set(silent, None)
lib.llama_backend_init()
join_groups()
measure(load, prefill, step, prompt, new, warm_up)
