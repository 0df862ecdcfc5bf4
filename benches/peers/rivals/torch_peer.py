"""transformers, accelerate's disk offload and AirLLM: NAME MODEL OFFLOAD_DIRECTORY THREADS PROMPT NEW."""

import os
import sys
import warnings

name, model_path, offload = sys.argv[1:4]
threads, prompt, new = map(int, sys.argv[4:7])
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(threads)
if name == "accelerate":
    import accelerate  # noqa: F401
if name == "airllm":
    import airllm
    from airllm.airllm_base import AirLLMBaseModel

    # The synthetic model has no tokenizer, and none is needed for token ids.
    AirLLMBaseModel.get_tokenizer = lambda self, hf_token=None: None

from common import join_groups, measure

state = {}


def load():
    if name == "airllm":
        os.makedirs(offload, exist_ok=True)
        model = airllm.AutoModel.from_pretrained(model_path, device="cpu", layer_shards_saving_path=offload)
        model.model.eval()
    elif name == "accelerate":
        layers = transformers.AutoConfig.from_pretrained(model_path).num_hidden_layers
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{layer}": "disk" for layer in range(layers)}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.bfloat16, device_map=places, offload_folder=offload)
        model.eval()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
        model.eval()
    state["model"] = model


def forward(ids, cache):
    with torch.inference_mode():
        answer = state["model"](input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    state["cache"] = answer.past_key_values
    state["next"] = int(answer.logits[0, -1].argmax())


join_groups()
measure(load, lambda ids: forward(ids, None), lambda: forward([state["next"]], state["cache"]), prompt, new, False)
