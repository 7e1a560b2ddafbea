"""Jet-Nemotron (arXiv:2508.15884) as a Hugging Face model; importing this registers it with the Auto classes.

Configuration and parameter names are those of the released 2B and 4B checkpoints, so `AutoModelForCausalLM` loads them
without remote code, and folders that `save_pretrained` writes have the released layout.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from jetlab.hf.cache_jet_nemotron import JetNemotronCache
from jetlab.hf.configuration_jet_nemotron import JetNemotronConfig
from jetlab.hf.modeling_jet_nemotron import JetNemotronForCausalLM, JetNemotronModel, JetNemotronPreTrainedModel

# exist_ok: the import must not fail in a version of Transformers that knows the name itself.
AutoConfig.register(JetNemotronConfig.model_type, JetNemotronConfig, exist_ok=True)
AutoModel.register(JetNemotronConfig, JetNemotronModel, exist_ok=True)
AutoModelForCausalLM.register(JetNemotronConfig, JetNemotronForCausalLM, exist_ok=True)

__all__ = [
    "JetNemotronCache",
    "JetNemotronConfig",
    "JetNemotronForCausalLM",
    "JetNemotronModel",
    "JetNemotronPreTrainedModel",
]
