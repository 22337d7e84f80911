"""From a method's name to a PEFT configuration."""

import pytest
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from rankbits.recipes.methods import CONFIGS
from rankbits.recipes.schema import AdapterSection

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_attaching_leaves_the_recipe_as_it_was(method) -> None:
    adapter = AdapterSection(r=2, targets=["query"], modules_to_save=["pooler"])
    config = CONFIGS[method](adapter)
    config.task_type = "SEQ_CLS"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    get_peft_model(BertForSequenceClassification(BertConfig(**sizes)), config)
    # PEFT adds the names of the classifier to the list that it is given.
    assert adapter.modules_to_save == ["pooler"]
