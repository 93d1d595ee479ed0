"""One question, answered by the ensemble over k passages (Eq. 2), with what each passage made the LM say.

python launch/ask.py "Who painted Summer at Lundovholt?" --workdir=runs/demo --json
"""

import json

from absl import flags

from radit_jax import command

CONFIG = command.config_flag()
JSON = flags.DEFINE_bool("json", False, "Print JSON.")
UNTUNED = flags.DEFINE_bool("untuned", False, "Use the untuned models even where tuned ones are there.")


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or not arguments[0].strip():
        raise command.InputError(f"expected one question in quotes, found {len(arguments)} arguments")
    from radit_jax.ask import ask

    answer = ask(command.pipeline(CONFIG), arguments[0], untuned=UNTUNED.value)
    if JSON.value:
        print(json.dumps(answer, ensure_ascii=False))
        return
    print(answer["answer"])
    for passage in answer["passages"]:
        print(f"  {passage['weight']:.3f}  {passage['title']}: {passage['answer']!r} (log p {passage['logprob']:.2f})")


if __name__ == "__main__":
    command.run(main)
