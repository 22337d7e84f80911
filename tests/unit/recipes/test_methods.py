"""From a method's name to a PEFT configuration."""

import pytest
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from rankbits.recipes.load import load
from rankbits.recipes.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_attaching_leaves_the_recipe_as_it_was(method) -> None:
    recipe = load("quickstart", ["adapter.r=2", "adapter.targets=[query]", "adapter.modules_to_save=[pooler]"])
    config = METHODS[method].config(recipe)
    config.task_type = "SEQ_CLS"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    get_peft_model(BertForSequenceClassification(BertConfig(**sizes)), config)
    # PEFT adds the names of the classifier to the list that it is given.
    assert recipe.adapter.modules_to_save == ["pooler"]
