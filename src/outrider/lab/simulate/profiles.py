"""Named modelled engines, each with where its constants come from. Facts and small numbers; pure."""

from outrider.errors import CallerError
from outrider.lab.twins.speed import Profile, Speed

DEFAULT = "smollm2-cpu"
PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="smollm2-cpu",
            speed=Speed(per_step_s=0.02, per_prompt_token_s=0.0008, per_decode_s=0.01, per_position_s=0.0),
            provenance="fitted by --calibrate to a live run of outrider demo on 2 cores",
            kv_tokens=1792,
            kv_bytes_per_token=46_080,
            max_batch_tokens=512,
            max_num_seqs=8,
            hop_s=0.002,
            copy_bytes_per_s=5e9,
        ),
    )
}


def named(name: str) -> Profile:
    """CallerError where there is none of that name."""
    if name not in PROFILES:
        raise CallerError(f"--profile {name}: not known. Choose one of {', '.join(PROFILES)}, or use --calibrate.")
    return PROFILES[name]
