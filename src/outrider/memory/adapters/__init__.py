"""Real engines on memory. `vllm.OutriderConnector` is the one vLLM names; only that module and `counters` import vllm.

vllm      the door: vLLM's hooks, what is refused at start           asking   the scheduler's half: what is in memory
counters  what the connector counts, in vLLM's log and /metrics      copying  the worker's half: blocks in and out
orders    what the one half tells the other, once a step             pages    KV tensors as whole blocks of bytes
weights   a digest of the weights' content                           reach    a Store that may be away
"""
