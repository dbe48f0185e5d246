"""Run what users of the Hugging Face world do with a model, and write down what works: a table of docs/huggingface.md.

python docs/huggingface_table.py           # print it
python docs/huggingface_table.py --write   # and put it into the page
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

PAGE = Path(__file__).with_name("huggingface.md")
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
Feature = Callable[[Any], object]


class Desk:
    """A small model in a directory, loaded as its users load it."""

    def __init__(self, directory: Path) -> None:
        from taipan import TaipanConfig, TaipanLM
        from taipan.data.tokenizer import Tokenizer

        config = TaipanConfig(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=64,
            layer_types=["mamba2", "selective_attention", "mamba2"],
            state_size=8,
            mamba_head_dim=16,
            num_attention_heads=4,
            sliding_window=32,
            eos_token_id=256,
            pad_token_id=256,
        )
        TaipanLM(config, generator=torch.Generator().manual_seed(0)).save_pretrained(directory, Tokenizer.bytes())
        self.directory = directory
        self.tokens = torch.arange(97, 109)[None]

    def load(self, **options: Any) -> Any:
        from transformers import AutoModelForCausalLM

        import taipan.hf

        assert taipan.hf
        return AutoModelForCausalLM.from_pretrained(self.directory, **options)

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.directory)

    def generate(self, **options: Any) -> Any:
        return self.load().generate(self.tokens, max_new_tokens=4, do_sample=False, **options)

    def training(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.directory / "training"),
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
        }

    def quantised(self, settings: Any) -> Any:
        return self.load(quantization_config=settings)(self.tokens, labels=self.tokens).loss

    def adapted(self, settings: Any) -> Any:
        from peft import get_peft_model

        model: Any = get_peft_model(self.load(), settings)
        model.train()
        model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        return model


def offloaded(desk: Desk) -> object:
    from accelerate import cpu_offload

    model = desk.load()
    cpu_offload(model, execution_device="cpu")
    return model(desk.tokens)


def tasks(desk: Desk) -> object:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=desk.load(), tokenizer=desk.tokenizer(), batch_size=1)
    return lm.loglikelihood([Instance("loglikelihood", {}, ("a " * 1500, "b"), 0)])


def trained(desk: Desk, **options: Any) -> object:
    """One step of transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": desk.tokens[0], "labels": desk.tokens[0]}] * 4
    settings = {**desk.training(), **options}
    return Trainer(model=desk.load(), args=TrainingArguments(**settings), train_dataset=rows).train()


def tuned(desk: Desk, kind: str, rows: dict[str, Any], *, adapter: bool = False, **options: Any) -> object:
    """One step of a trainer of TRL, of the name and with the configuration that begin with `kind`."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification

    more: dict[str, Any] = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if adapter else {}
    if kind in {"GRPO", "RLOO"}:
        more["reward_funcs"] = lambda completions, **_: [float(len(each)) for each in completions]
    load = AutoModelForSequenceClassification.from_pretrained
    trainer = getattr(trl, f"{kind}Trainer")(
        model=load(desk.directory, num_labels=1) if kind == "Reward" else desk.load(),
        args=getattr(trl, f"{kind}Config")(**desk.training(), bf16=False, **options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=desk.tokenizer(),
        **more,
    )
    return trainer.train()


def lines(desk: Desk) -> Any:
    """Every feature: its name, the library whose version counts, what is run."""
    from peft import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import BitsAndBytesConfig, TorchAoConfig, pipeline

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens).logits

    stop = {"stop_strings": ["zz"], "tokenizer": desk.tokenizer()}
    shards = {"save_directory": desk.directory / "shards", "max_shard_size": "100KB"}
    norms = LNTuningConfig(target_modules=r".*layers\.\d+\.norm")
    lora = {"r": 4, "task_type": "CAUSAL_LM"}
    yield "Auto classes, logits", "transformers", lambda: desk.load()(desk.tokens)
    yield "`generate`, greedy", "transformers", desk.generate
    yield "`generate`, beams", "transformers", lambda: desk.generate(num_beams=3)
    yield (
        "`generate`, stop strings",
        "transformers",
        lambda: desk.generate(**stop),
    )
    yield "assisted decoding", "transformers", lambda: desk.generate(assistant_model=desk.load())
    yield "prompt lookup", "transformers", lambda: desk.generate(prompt_lookup_num_tokens=3)
    yield "contrastive search", "transformers", lambda: desk.generate(penalty_alpha=0.6, top_k=4)
    yield "static cache", "transformers", lambda: desk.generate(cache_implementation="static")
    yield "continuous batching", "transformers", lambda: desk.load().generate_batch([[1, 2]])
    yield "pipeline", "transformers", lambda: pipeline("text-generation", str(desk.directory))("a", max_new_tokens=2)
    yield "embeddings instead of ids", "transformers", lambda: desk.load()(inputs_embeds=torch.zeros(1, 2, 64))
    yield (
        "sharded directories",
        "transformers",
        lambda: desk.load().save_pretrained(**shards),
    )
    yield "Trainer", "transformers", lambda: trained(desk)
    yield "Trainer, label smoothing", "transformers", lambda: trained(desk, label_smoothing_factor=0.1)
    yield "Trainer, `torch_compile=True`", "transformers", lambda: trained(desk, torch_compile_backend="aot_eager")
    texts = {"text": ["one two three", "another one"]}
    pairs = {"prompt": ["hello "] * 2, "chosen": ["world"] * 2, "rejected": ["w"] * 2}
    answers = {"prompt": ["hello "] * 2, "completion": ["world", "w"], "label": [True, False]}
    sampled = {"num_generations": 2, "max_completion_length": 4}
    yield "SFT", "trl", lambda: tuned(desk, "SFT", texts)
    yield "SFT with LoRA", "trl", lambda: tuned(desk, "SFT", texts, adapter=True)
    yield "SFT, packed", "trl", lambda: tuned(desk, "SFT", texts, packing=True, max_length=64)
    yield "DPO", "trl", lambda: tuned(desk, "DPO", pairs)
    yield "KTO", "trl", lambda: tuned(desk, "KTO", answers)
    yield "GRPO", "trl", lambda: tuned(desk, "GRPO", {"prompt": pairs["prompt"]}, **sampled)
    yield "RLOO", "trl", lambda: tuned(desk, "RLOO", {"prompt": pairs["prompt"]}, **sampled)
    yield "reward models", "trl", lambda: tuned(desk, "Reward", pairs)
    yield "offloading", "accelerate", lambda: offloaded(desk)
    yield "LoRA on all linears", "peft", lambda: desk.adapted(LoraConfig(target_modules="all-linear", **lora))
    yield "IA³", "peft", lambda: desk.adapted(IA3Config(target_modules=["in_proj", "out_proj"], feedforward_modules=[]))
    yield (
        "norms of the layers tuned",
        "peft",
        lambda: desk.adapted(norms),
    )
    yield "gated norms tuned", "peft", lambda: desk.adapted(LNTuningConfig(target_modules=r".*mixer\.norm"))
    yield "prefix tuning", "peft", lambda: desk.adapted(PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    yield "4 bit, with labels", "bitsandbytes", lambda: desk.quantised(BitsAndBytesConfig(load_in_4bit=True))
    yield "8 bit, with labels", "bitsandbytes", lambda: desk.quantised(BitsAndBytesConfig(load_in_8bit=True))
    yield "int8 weights, with labels", "torchao", lambda: desk.quantised(TorchAoConfig(Int8WeightOnlyConfig()))
    dynamic = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    yield "int8 weights and activations", "torchao", lambda: desk.quantised(copy.deepcopy(dynamic))
    through = lambda: desk.load(quantization_config=copy.deepcopy(dynamic)).train()(desk.tokens)  # noqa: E731
    yield "training through int8 activations", "torchao", through
    yield "prompts of 3,000 tokens", "lm_eval", lambda: tasks(desk)
    compiled = lambda: torch.compile(desk.load(), backend="aot_eager")(desk.tokens)  # noqa: E731
    yield "`torch.compile`", "torch", compiled
    yield "torch.export", "torch", lambda: torch.export.export(Logits(desk.load()), (desk.tokens,))
    yield "torch.jit.trace", "torch", lambda: torch.jit.trace(Logits(desk.load()), (desk.tokens,))


def table() -> str:
    """The table as Markdown."""
    from taipan.errors import TaipanError

    rows = ["| feature | version | result |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for feature, library, run in lines(Desk(Path(scratch))):
            try:
                run()
                said = "works"
            except TaipanError as error:
                said = f"refused: {str(error).split('. ')[0].replace('|', ' ').replace(scratch, 'DIR')}"
            except Exception as error:  # of a library, whatever it is: that is what the table is to show
                said = f"**fails**: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            rows.append(f"| {feature} | {library} {version(library).split('+')[0]} | {said.rstrip('.')} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    text = table()
    print(text)
    if "--write" in sys.argv[1:]:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")
    raise SystemExit("**fails**" in text)
