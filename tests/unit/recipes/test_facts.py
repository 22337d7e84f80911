"""What a record keeps of the learned gates: certainty, expectations and what matrices share, under short names."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import sizes
from transformers import BertConfig, BertForSequenceClassification

from rankbits import BayesianLoraConfig
from rankbits.recipes import facts
from rankbits.tuners.bayesian_lora import adapted_layers, summarize

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_a_summary_becomes_records_with_probabilities_and_owners() -> None:
    small = sizes(hidden=16, layers=1, heads=2, wide=24, words=30)
    config = BayesianLoraConfig(r=3, target_modules=["query", "key"], quantizers=["weight", "input"])
    model = get_peft_model(BertForSequenceClassification(BertConfig(**small)), config)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.gates_of("default").bit_logits[0] = torch.tensor([1.0, -0.5, -3.0, 0.0])
    summaries = summarize(model)
    query, key = facts.learned(model, summaries)
    assert (query.name, query.shared) == ("bert.encoder.layer.0.attention.self.query", {})
    assert key.shared == {"input": query.name}
    assert query.bit_open_probabilities["weight"] == list(summaries[0].bit_open_probabilities["weight"])
    assert (query.rank_gate, len(query.rank_open_probabilities)) == ("ste", 2)
    assert query.expected_bits["weight"] == summaries[0].expected_bits["weight"]
    assert [gate.level for gate in query.deciding_gates() if gate.site == "weight"] == [4, 8, 16]
