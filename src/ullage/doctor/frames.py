"""Where in an engine's code the memory ran out, by the functions that its traceback names."""

from dataclasses import dataclass

from ullage.doctor.diagnosis import Change, Culprit, Diagnosis, Phase, evidence
from ullage.doctor.log import Found, Log

WORDS = (", in ", "self.sampler", "lm_head")


@dataclass(frozen=True)
class Place:
    """A stage of the run and the part that was growing there; `doing` completes "while"."""

    phase: Phase
    culprit: Culprit
    doing: str
    found: Found


# The innermost places first: the outer ones stand in the same traceback.
_PLACES: tuple[tuple[str, Phase, Culprit, str], ...] = (
    (r"_?get_prompt_logprobs\w*", "prefill", "logits", "computing prompt_logprobs"),
    (r"_dummy_sampler_run", "profile", "logits", "warming up the sampler"),
    (r"(?:capture_model|capture_one_batch_size|_warmup_and_capture|capture_begin|capture_end"
     r"|init_(?:decode_)?cuda_graphs?)", "profile", "graphs", "capturing CUDA graphs"),
    (r"(?:profile_run|determine_available_memory|determine_num_available_blocks|_dummy_run)",
     "profile", "activation", "running the profiling pass"),
    (r"(?:_allocate_kv_cache\w*|initialize_kv_cache|init_memory_pool|_create_buffers"
     r"|_allocate_kv_cache_tensors)", "profile", "kv", "allocating the KV pool"),
    (r"(?:load_model|load_weights|initialize_model|create_weights|from_pretrained"
     r"|_load_pretrained_model|process_weights_after_loading)", "load", "weights",
     "loading the weights"),
    (r"(?:compute_logits|compute_logprobs|log_softmax|random_sample|apply_top_k_top_p)",
     "serve", "logits", "computing logits"),
    (r"(?:eager_attention_forward|repeat_kv)", "prefill", "activation", "scoring attention"),
    (r"(?:embed_multimodal|get_multimodal_embeddings|_execute_mm_encoder)", "prefill", "activation",
     "encoding an image"),
    (r"(?:execute_model|forward_extend|forward_batch_generation|_prefill)", "prefill", "activation",
     "running a request"),
    (r"forward_decode", "decode", "activation", "running a request"),
    (r"(?:generate|_sample)", "prefill", "activation", "generating"),
)  # fmt: skip


def place_of(log: Log) -> Place | None:
    """The stage that the traceback names, or None."""
    for names, phase, culprit, doing in _PLACES:
        found = log.first(rf"line \d+, in {names}\b")
        if found is not None:
            return Place(phase, culprit, doing, found)
    return None


def scoreless_attention(log: Log, score_bytes: int | None = None) -> tuple[Change, ...]:
    """Another attention, where the traceback shows the one of transformers that builds the score
    matrix, of `score_bytes` if those are known."""
    if log.first(r"line \d+, in eager_attention_forward\b") is None:
        return ()
    why = "in from_pretrained: eager attention builds every score of a prompt, SDPA in pieces"
    return (Change('attn_implementation="sdpa"', why, score_bytes),)


def pytorch_failure(
    log: Log, found: Found, happened: str, culprit: Culprit | None, **more: object
) -> Diagnosis:
    """The failure, in `found`, of a program that runs PyTorch itself: with the stage and the part
    that its traceback names, or `culprit` where it names none."""
    place = place_of(log)
    doing = f" while {place.doing}" if place else ""
    return Diagnosis(
        happened=f"{happened}{doing}.",
        failed=True,
        engine="pytorch",
        phase=place.phase if place else None,
        culprit=place.culprit if place else culprit,
        evidence=evidence(found, place.found if place else None),
        **more,  # type: ignore[arg-type]
    )
