"""What HPSv3 reads: where its template lies, and its special token.

Four lines of the template end in spaces, one, two, one and two of them. Ports that lost them score
another text; the hash finds that out.
"""

from fastgrpo.rewards.networks.qwen2_vl.reader import Form
from fastgrpo.rewards.networks.qwen2_vl.template import Official

FORM = Form(marks=("<|Reward|>",), seen="<|image_pad|>", model="Qwen2-VL-7B-Instruct")
TEMPLATE = Official(
    file="hpsv3/dataset/data_collator_qwen.py",
    repository="https://github.com/MizzenAI/HPSv3",
    names=("INSTRUCTION", "prompt_with_special_token"),
    sha256="f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c",
)
