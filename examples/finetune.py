"""Fine-tune on conversations with TRL, and get a chat model that embeds. Needs `pip install 'gemify[trl]'`."""

import torch
from datasets import load_dataset
from trl import SFTConfig

from gemify import GemModel
from gemify.integrations.trl import GemSFTTrainer

BASE = "starter"  # or any chat model
CHATS = "my_chats.jsonl"  # rows such as {"messages": [{"role": "user", "content": "Hi"}, ...]}
STEPS = 200

# %% The fine-tuning that you make anyway: GEM's rows are cut from the same conversations
gem = GemModel.from_base(BASE, tune="lora")  # or "full"
chats = load_dataset("json", data_files=CHATS, split="train")
args = SFTConfig(
    "my-sft", max_steps=STEPS, learning_rate=2e-4, logging_steps=10, bf16=torch.cuda.is_available(), report_to="none"
)
trainer = GemSFTTrainer(gem, args, train_dataset=chats, recipe={"ntp_steps": STEPS // 4})
trainer.train()
gem.save_pretrained("my-chat-gem")

# %% One model chats and embeds
question = [{"role": "user", "content": "What can you do?"}]
print(gem.chat(question, max_new_tokens=30))
print(gem.encode(["What can you do?", "What are your skills?"]).shape)
