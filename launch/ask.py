"""A question, answered by the ensemble over k passages (Eq. 2), with what each passage made the LM say; by four systems; or a page for it.

python launch/ask.py "Who painted Summer at Lundovholt?" --workdir=runs/demo [--json] [--compare] [--level=token] [--history=chat.jsonl]
python launch/ask.py --web --workdir=runs/demo [--port=7860]
"""

from absl import flags

from radit_jax import command

CONFIG = command.config_flag()
JSON = flags.DEFINE_bool("json", False, "Print JSON.")
UNTUNED = flags.DEFINE_bool("untuned", False, "Use the untuned models even where tuned ones are there.")
COMPARE = flags.DEFINE_bool("compare", False, "Side by side: closed book, neither tuned, LM-ft only, both.")
LEVEL = flags.DEFINE_enum(
    "level", "sequence", ["sequence", "token"], "Where passages come together; token: the answer is shown as it comes."
)
HISTORY = flags.DEFINE_string("history", None, 'What was said before: a jsonl file of {"role": "user" or "assistant", "content"}.')
WEB = flags.DEFINE_bool("web", False, "Serve a page to ask on, with the systems side by side.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "--web: the address to listen at; others than this computer's own let others in.")
PORT = flags.DEFINE_integer("port", 7860, "--web: the port; 0 takes a free one.", lower_bound=0, upper_bound=65535)


def main(arguments: list[str]) -> None:
    if (COMPARE.value or WEB.value) and (UNTUNED.value or LEVEL.value != "sequence"):
        raise command.InputError("--untuned and --level=token are for one system, --compare and --web ask several at sequence level")
    if len(arguments) != (0 if WEB.value else 1):
        raise command.InputError(f"expected {'no question with --web' if WEB.value else 'one question in quotes'}, found {len(arguments)}")
    from radit_jax import terminal, web

    if WEB.value:
        return web.serve(lambda: command.pipeline(CONFIG), HOST.value, PORT.value)
    how = {"history": HISTORY.value, "compare": COMPARE.value, "untuned": UNTUNED.value, "level": LEVEL.value, "as_json": JSON.value}
    terminal.answer(lambda: command.pipeline(CONFIG), arguments[0], **how)


if __name__ == "__main__":
    command.run(main)
