"""What VideoAlign reads: where its template lies, and its special tokens.

The template belongs to the official repository (github.com/KwaiVGI/VideoAlign, MIT) and is not
shipped: the user names that repository's prompt_template.py, which is parsed and never executed, or
a text file.
"""

from fastgrpo.rewards.networks.qwen2_vl.reader import Form
from fastgrpo.rewards.networks.qwen2_vl.template import Official

FORM = Form(
    marks=("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"),
    seen="<|video_pad|>",
    model="Qwen2-VL-2B-Instruct",
)
TEMPLATE = Official(
    file="prompt_template.py",
    repository="https://github.com/KwaiVGI/VideoAlign",
    names=("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",),
    sha256="fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700",
)
