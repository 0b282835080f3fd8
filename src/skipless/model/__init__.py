"""The skipless model for transformers. Importing this package registers it with the AutoClasses."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from skipless.model.configuration_skipless import SkiplessConfig
from skipless.model.modeling_skipless import SkiplessForCausalLM, SkiplessModel, SkiplessPreTrainedModel

AutoConfig.register("skipless", SkiplessConfig, exist_ok=True)
AutoModel.register(SkiplessConfig, SkiplessModel, exist_ok=True)
AutoModelForCausalLM.register(SkiplessConfig, SkiplessForCausalLM, exist_ok=True)

# save_pretrained then writes the two model files and auto_map, so that a saved model loads without this library too.
SkiplessConfig.register_for_auto_class("AutoConfig")
SkiplessModel.register_for_auto_class("AutoModel")
SkiplessForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["SkiplessConfig", "SkiplessForCausalLM", "SkiplessModel", "SkiplessPreTrainedModel"]
