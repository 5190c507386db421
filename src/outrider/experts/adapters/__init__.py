"""Routes as others record them, read into one table and written back. Import law: third parties appear here alone.

formats   which reader takes a file; `read` and `convert`     filling   a table filled piece by piece, in its least type
npz       our own file, domains, request dumps                members   arrays inside an npz, block by block
verl      a veRL batch, on disk or in memory                  lines     JSON files as numbered records
answers   vLLM, SGLang, Outrider's engine                     megatron  router traces, a file a rank
"""

from outrider.experts.adapters.answers import from_sglang, from_vllm
from outrider.experts.adapters.filling import Ask
from outrider.experts.adapters.formats import FORMATS, convert, read
from outrider.experts.adapters.verl import from_verl

__all__ = ["FORMATS", "Ask", "convert", "from_sglang", "from_verl", "from_vllm", "read"]
