import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine import async_engine
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.errors import EngineDeadError, UserError
from engine.link import EngineLink
from engine.outputs import OutputDelta, RequestOutput
from engine.quarantine import QuarantinedError
from engine.request_stream import RequestStream
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from tests.engine.fake_engine import DIES, FAILS, HANGS, KILLS_ITSELF, MAX_MODEL_LEN, STOPS, VOCAB_SIZE

FAKE_ENGINE = [sys.executable, str(Path(__file__).with_name("fake_engine.py"))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as far as this process needs one: a config to be found by, and a tokenizer."""
    import tokenizers
    from tokenizers import decoders, models

    words = ["<s>", "</s>", "fox", " jumps", " over", " the", " dog", "\n", *map(chr, range(97, 123))]
    vocab = {word.replace(" ", "Ġ").replace("\n", "Ċ"): i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


FOX = [2, 3, 4, 5, 6]  # "fox jumps over the dog"


@asynccontextmanager
async def running(
    folder: Path, mode: str = "serves", max_restarts: int = 3, step_timeout_s: float = 60.0, **options: Any
) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(
        EngineConfig(model=str(folder), **options),
        link=EngineLink([*FAKE_ENGINE, mode]),
        max_restarts=max_restarts,
        step_timeout_s=step_timeout_s,
    )
    await engine.start()
    try:
        await engine.wait_ready()
        yield engine
    finally:
        await engine.shutdown()


async def tokens_of(stream: RequestStream) -> list[int]:
    return [token for delta in await collect(stream) for token in delta.token_ids]


async def collect(stream: RequestStream) -> list[OutputDelta]:
    return [delta async for deltas in stream for delta in deltas]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happens")


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, timeout=60))


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 5, **options})


def test_a_prompt_becomes_a_stream_of_text(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            assert engine.tokenizer is not None
            assert engine.progress == ("loading weights", 0.5)
            deltas = await collect(engine.submit(FOX, params()))
            assert [token for delta in deltas for token in delta.token_ids] == FOX
            assert "".join(delta.text for delta in deltas) == "fox jumps over the dog"
            assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["length"]
            assert deltas[0].num_cached_tokens == 5

    run(story())


def test_the_whole_result_can_be_waited_for(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            output = await engine.submit(FOX, params(max_tokens=7), request_id="r", prompt="the prompt").result()
            assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "the prompt", FOX)
            assert output.outputs[0].text == "fox jumps over the dogfox jumps"
            assert output.finished

    run(story())


def test_many_streams_get_their_own_tokens(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            prompts = [[2 + i % 30, 2 + i // 30] for i in range(200)]
            streams = [engine.submit(prompt, params(max_tokens=10)) for prompt in prompts]
            for prompt, deltas in zip(prompts, await asyncio.gather(*map(collect, streams)), strict=True):
                assert [token for delta in deltas for token in delta.token_ids] == prompt * 5
            assert not engine._sequences, "a finished request leaves nothing"

    run(story())


def test_n_sequences_are_n_requests_with_seeds_of_their_own(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            stream = engine.submit(FOX, params(n=3, seed=11), request_id="r")
            requests = [sequence.request for sequence in stream.state.sequences]
            assert [request.request_id for request in requests] == ["r-0", "r-1", "r-2"]
            assert [request.leader_id for request in requests] == ["", "r-0", "r-0"]
            assert requests[0].params.seed == 11
            assert len({request.params.seed for request in requests}) == 3
            output = await stream.result()
            assert [each.index for each in output.outputs] == [0, 1, 2]
            assert {each.text for each in output.outputs} == {"fox jumps over the dog"}

    run(story())


def test_a_stop_string_ends_the_sequence_in_the_engine_too(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            deltas = await collect(engine.submit(FOX, params(max_tokens=50, stop=["over t"])))
            assert "".join(delta.text for delta in deltas) == "fox jumps "
            assert [token for delta in deltas for token in delta.token_ids] == FOX[:4]
            assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "over t")
            await until(lambda: engine.stats.num_preemptions == 1)
            assert engine.stats.num_running == 0

    run(story())


def test_the_models_own_end_is_no_text(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            output = await engine.submit([STOPS, 3, 4], params(skip_special_tokens=False)).result()
            assert output.outputs[0].text == " jumps over", "token 503 has no text and </s> ends it"
            assert output.outputs[0].token_ids == [STOPS, 3, 4, 1]
            assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)

    run(story())


def test_leaving_a_stream_aborts_what_still_runs(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            finished: list[list[str]] = []
            engine.on_finish.append(lambda timings: finished.append(timings.finish_reasons))
            async with engine.submit(FOX, params(max_tokens=50, n=2)) as stream:
                async for _ in stream:
                    break
            assert finished == [["abort", "abort"]]
            await until(lambda: engine.stats.num_preemptions == 2)
            assert await collect(stream) == [], "an aborted stream is at its end"
            stream.abort()
            assert len(finished) == 1
            assert not engine._sequences

    run(story())


def test_leaving_a_finished_stream_aborts_nothing(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            async with engine.submit(FOX, params()) as stream:
                await stream.result()
            await engine.submit(FOX, params()).result()
            assert engine.stats.num_preemptions == 0

    run(story())


def test_all_who_look_at_the_same_time_see_one_inspection(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            first, second = await asyncio.gather(engine.inspect(10), engine.inspect(10))
            assert first is second is engine.inspection
            assert first is not None
            assert first.blocks == b"\0"
            assert await engine.inspect(10) is not first

    run(story())


def test_who_looks_at_an_engine_that_is_silent_sees_what_was_last(folder: Path):
    async def story() -> None:
        async with running(folder, max_restarts=1) as engine:
            seen = await engine.inspect(10)
            stream = engine.submit([HANGS, 5], params())
            await stream.wait()
            await until(lambda: stream.state.timings.num_output_tokens == 2)
            waiting = asyncio.create_task(engine.inspect(60))
            assert await engine.inspect(0.01) is seen
            assert engine._link is not None
            engine._link.kill()
            assert await waiting is seen, "an engine that is gone says nothing any more"
            stream.abort()

    run(story())


def test_a_finished_request_reports_its_times(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            seen = []
            engine.on_finish.append(seen.append)
            before = time.monotonic()
            await engine.submit(FOX, params()).result()
            (timings,) = seen
            assert (
                before
                <= timings.arrival_time
                <= timings.scheduled_time
                <= timings.first_token_time
                <= timings.last_token_time
                <= time.monotonic()
            )
            assert (timings.num_prompt_tokens, timings.num_output_tokens, timings.num_cached_tokens) == (5, 5, 5)
            assert timings.finish_reasons == ["length"]

    run(story())


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "the prompt is empty"),
        ([2] * 64, {}, "prompt has 64 tokens and --max-model-len is 64: shorten it or raise the limit"),
        ([2, 512], {}, "the prompt holds token 512, and the model's tokens are 0 to 511"),
        ([2, -1], {}, "the prompt holds token -1,"),
        (FOX, {"stop_token_ids": [1000]}, "stop_token_ids holds token 1,000"),
        (FOX, {"logit_bias": {700: 1.0}}, "logit_bias names token 700"),
        (FOX, {"stop": ["x"], "detokenize": False}, "stop strings need text"),
    ],
)
def test_a_request_that_cannot_run_is_refused_with_the_reason(folder: Path, prompt: list[int], options, words: str):
    async def story() -> None:
        async with running(folder) as engine:
            with pytest.raises(ValueError, match=words):
                engine.submit(prompt, params(**options))
            assert (await engine.submit(FOX, params()).result()).finished, "the next one is served"

    run(story())


def test_max_tokens_is_cut_to_the_context(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            for open_limit in (None, 1000):
                output = await engine.submit(FOX, params(max_tokens=open_limit)).result()
                assert len(output.outputs[0].token_ids) == MAX_MODEL_LEN - len(FOX)

    run(story())


def test_requests_with_the_same_name_do_not_meet(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            streams = [engine.submit([token], params(), request_id="same") for token in (2, 3)]
            streams += [engine.submit([token], params(n=2), request_id="same") for token in (4, 5)]
            streams += [engine.submit([6], params(), request_id="same-0")]
            for token, stream in zip(FOX, streams, strict=True):
                output = await stream.result()
                assert {tuple(each.token_ids) for each in output.outputs} == {(token,) * 5}

    run(story())


def test_without_a_tokenizer_there_are_tokens_and_no_text(folder: Path):
    async def story() -> None:
        (folder / "tokenizer.json").unlink()
        async with running(folder, skip_tokenizer_init=True) as engine:
            output = await engine.submit(FOX, params()).result()
            assert (output.outputs[0].token_ids, output.outputs[0].text) == (FOX, "")
            with pytest.raises(ValueError, match="stop strings need text"):
                engine.submit(FOX, params(stop=["fox"]))

    run(story())


@pytest.mark.parametrize(
    ("command", "words", "returncode"),
    [
        (DIES, "ended with exit code 7", 7),
        (FAILS, "CUDA error: out of cheese", 1),
        (KILLS_ITSELF, "ended by SIGKILL", -9),
    ],
)
def test_the_engines_death_reaches_every_open_stream(folder: Path, command: int, words: str, returncode: int):
    async def story() -> None:
        async with running(folder, max_restarts=1) as engine:
            streams = [engine.submit([token, 3], params(max_tokens=50)) for token in (2, command)]
            for stream in streams:
                with pytest.raises(EngineDeadError, match=words):
                    await collect(stream)
            assert engine.error is not None
            assert words in engine.error
            assert engine.returncode == returncode
            with pytest.raises(EngineDeadError, match=words):
                engine.submit(FOX, params())
            assert not engine._sequences

    run(story())


def test_streams_go_on_in_the_next_engine(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            prompts = [[2 + i, 3 + i] for i in range(20)]
            streams = [asyncio.create_task(collect(engine.submit(each, params(max_tokens=60)))) for each in prompts]
            for number in (1, 2, 3):
                await asyncio.sleep(0.1)
                assert engine._link is not None
                engine._link.kill()
                await until(lambda number=number: engine.num_restarts == number and not engine.is_restarting)
            for prompt, deltas in zip(prompts, await asyncio.gather(*streams), strict=True):
                assert [token for delta in deltas for token in delta.token_ids] == prompt * 30
                assert [delta.num_cached_tokens for delta in deltas] == [5] * len(deltas)
            assert engine.error is None
            assert engine.num_quarantined == 0, "SIGKILL comes from outside, and accuses nobody"

    run(story())


def test_a_process_stands_by_for_the_next_engine(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            stream = asyncio.create_task(tokens_of(engine.submit(FOX, params(max_tokens=40))))
            await until(lambda: engine._standby.link is not None)
            assert engine._link is not None
            assert engine._standby.link is not None
            standby = engine._standby.link.process
            await until(lambda: engine._standby.link is not None and engine._standby.link.is_warm)
            engine._link.kill()
            await until(lambda: engine.num_restarts == 1 and not engine.is_restarting)
            assert engine._link.process is standby
            assert await stream == FOX * 8
            await until(lambda: engine._standby.link is not None)
            standby = engine._standby.link.process
            standby.kill()
            await engine.restart()
            await until(lambda: engine._standby.link is not None and engine._standby.link.process is not standby)
            standby = engine._standby.link.process
        assert standby.poll() is not None, "it ends with the engine"

    run(story())


def test_an_engine_that_hangs_while_it_loads_again_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(async_engine, "LOADING_TIMEOUT_S", 0.5)
    monkeypatch.setattr(async_engine, "STANDBY_AFTER_S", 60.0)

    async def story() -> None:
        async with running(folder, step_timeout_s=0.5) as engine:
            stream = asyncio.create_task(tokens_of(engine.submit(FOX, params(max_tokens=40))))
            assert engine._link is not None
            engine._link.command = [*FAKE_ENGINE, "loads forever"]
            engine._link.kill()
            await until(lambda: engine.num_restarts == 1)
            engine._link.command = [*FAKE_ENGINE, "serves"]
            assert await stream == FOX * 8
            assert engine.num_restarts == 2
            assert engine.num_quarantined == 0

    run(story())


def test_an_engine_can_be_replaced_as_often_as_one_wants(folder: Path):
    async def story() -> None:
        async with running(folder, max_restarts=0) as engine:
            prompts = [[2 + i, 3 + i] for i in range(20)]
            streams = [asyncio.create_task(tokens_of(engine.submit(each, params(max_tokens=60)))) for each in prompts]
            for number in (1, 2):
                await asyncio.sleep(0.1)
                restarting = asyncio.create_task(engine.restart())
                await asyncio.sleep(0)
                assert engine.is_restarting
                with pytest.raises(RuntimeError, match="loading already"):
                    await engine.restart()
                await restarting
                assert not engine.is_restarting
                assert engine.num_restarts == number
            assert await asyncio.gather(*streams) == [prompt * 30 for prompt in prompts]

    run(story())


@pytest.mark.parametrize(("poison", "num_others"), [(DIES, 5), (FAILS, 5), (HANGS, 5)])
def test_a_request_that_ends_engines_fails_alone(folder: Path, poison: int, num_others: int):
    async def story() -> None:
        async with running(folder, step_timeout_s=1.0) as engine:
            convicted = []
            engine.on_conviction.append(lambda state, error: convicted.append((state.request_id, str(error))))
            prompts = [[2 + i, 3 + i] for i in range(num_others)]
            streams = [asyncio.create_task(tokens_of(engine.submit(each, params(max_tokens=60)))) for each in prompts]
            bad = engine.submit([poison, 3], params(max_tokens=50), request_id="bad")
            twin = engine.submit([poison, 3], params(max_tokens=50, seed=7), request_id="twin")
            for stream in (bad, twin):
                with pytest.raises(QuarantinedError, match="ended the engine, and did it again when it ran alone"):
                    await collect(stream)
            assert await asyncio.gather(*streams) == [prompt * 30 for prompt in prompts]
            assert engine.num_restarts == 3, "twice with the others, once alone"
            assert engine.num_quarantined == 1
            assert [name for name, _ in convicted] == ["bad", "twin"]
            with pytest.raises(QuarantinedError, match=f"refused for 10 minutes.* {reference_in(convicted[0][1])}$"):
                engine.submit([poison, 3], params(max_tokens=50))
            assert await tokens_of(engine.submit([4, poison], params())) == [4, poison, 4, poison, 4]

    run(story())


def reference_in(message: str) -> str:
    return message.rsplit(maxsplit=1)[-1]


def test_every_request_that_ends_engines_is_found(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            streams = [engine.submit([token, 3], params(n=2, max_tokens=20)) for token in (2, DIES, 4, FAILS)]
            results = await asyncio.gather(*(stream.result() for stream in streams), return_exceptions=True)
            assert [isinstance(result, QuarantinedError) for result in results] == [False, True, False, True]
            for token, result in ((2, results[0]), (4, results[2])):
                assert isinstance(result, RequestOutput)
                assert [output.token_ids for output in result.outputs] == [[token, 3] * 10] * 2
            assert engine.num_restarts == 4
            assert not engine._sequences

    run(story())


def test_a_trial_ends_when_its_client_leaves(folder: Path):
    async def story() -> None:
        async with running(folder, step_timeout_s=1.0) as engine:
            bad = engine.submit([HANGS, 3], params(max_tokens=20))
            waits = asyncio.create_task(tokens_of(engine.submit(FOX, params(max_tokens=20))))
            await until(lambda: engine._quarantine.on_trial is bad.state and engine._engine_ready is not None)
            assert engine.is_restarting
            assert engine.progress == ("trying requests one by one", 0.0)
            await asyncio.sleep(0.3)  # it hangs already
            late = asyncio.create_task(tokens_of(engine.submit([7], params())))
            bad.abort()
            assert await waits == FOX * 4
            assert await late == [7] * 5
            assert engine.num_quarantined == 0
            assert not engine.is_restarting

    run(story())


@pytest.mark.parametrize(("mode", "words"), [("dies loading", "exit code 3"), ("fails loading", "no such model: /")])
def test_an_engine_that_dies_while_loading_says_why(folder: Path, mode: str, words: str):
    async def story() -> None:
        with pytest.raises(UserError, match=words):
            async with running(folder, mode):
                pass

    run(story())


def test_a_model_without_tokenizer_ends_the_start(folder: Path):
    async def story() -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        with pytest.raises(UserError, match="has no tokenizer"):
            async with running(folder, "loads forever"):
                pass

    run(story())


def test_submitting_before_the_model_is_loaded_is_an_error(folder: Path):
    async def story() -> None:
        engine = AsyncEngine(EngineConfig(model=str(folder)), link=EngineLink([*FAKE_ENGINE, "loads forever"]))
        await engine.start()
        with pytest.raises(RuntimeError, match="still loading"):
            engine.submit(FOX, params())
        await engine.shutdown()
        assert engine.returncode == -signal.SIGKILL
        with pytest.raises(UserError, match="shut down"):
            await engine.wait_ready()

    run(story())


def test_shutdown_ends_open_streams_and_the_process_and_cleans_up(folder: Path):
    async def story() -> None:
        async with running(folder) as engine:
            stream = engine.submit(FOX, params(max_tokens=50))
            assert engine._link is not None
            directory = Path(engine._link._directory.name)
            assert directory.stat().st_mode & 0o777 == 0o700
            assert os.getsid(engine._link.process.pid) != os.getsid(0), "Ctrl-C in the terminal is not for the engine"
        with pytest.raises(EngineDeadError, match="shut down"):
            await collect(stream)
        assert engine.returncode == 0
        assert not directory.exists()
        await engine.shutdown()

    run(story())


def test_a_request_that_breaks_here_breaks_alone(folder: Path, monkeypatch: pytest.MonkeyPatch):
    async def story() -> None:
        async with running(folder) as engine:
            stream, other = engine.submit(FOX, params()), engine.submit(FOX, params())
            monkeypatch.setattr(stream.state, "take", None)
            with pytest.raises(TypeError):
                await collect(stream)
            assert (await other.result()).outputs[0].text == "fox jumps over the dog"
            await until(lambda: engine.stats.num_preemptions == 1)

    run(story())


def test_the_real_engine_serves_a_tiny_model_from_any_directory(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)

    async def story() -> None:
        folder = tiny_checkpoint("llama")
        config = EngineConfig(model=str(folder), device="cpu", dtype="float32", kv_cache_memory=1 << 20)
        engine = AsyncEngine(config)
        await engine.start()
        try:
            await engine.wait_ready()
            assert engine.ready is not None
            assert engine.ready.vocab_size == VOCAB_SIZE
            greedy = params(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=2)
            outputs = [await engine.submit([5, 6, 7], greedy).result() for _ in range(2)]
            first, again = (output.outputs[0] for output in outputs)
            assert first.token_ids == again.token_ids
            assert len(first.token_ids) == 20
            assert first.logprobs is not None
            assert [each.token_id for each in first.logprobs] == first.token_ids
            assert first.text == Tokenizer.load(str(folder)).decode(first.token_ids)

            three = await engine.submit([5, 6, 7], params(n=3, seed=1, max_tokens=20)).result()
            assert len({tuple(each.token_ids) for each in three.outputs}) == 3
            async with engine.submit([5, 6, 7], params(max_tokens=None, ignore_eos=True)) as stream:
                await anext(stream)
            await until(lambda: engine.stats.num_running == 0)
            assert engine.stats.num_blocks_used == 0
        finally:
            await engine.shutdown()

    run(story())
