"""What the demo asks."""

from __future__ import annotations

from typing import NamedTuple


class Prompt(NamedTuple):
    """A question, with a text to read first if there is one.

    Attributes:
        question: for the model.
        about: what kind of prompt it is, for the reader.
        text: what the question is about, or "".
    """

    question: str
    about: str
    text: str = ""

    def messages(self) -> list[dict[str, str]]:
        """The prompt as a conversation."""
        content = f"{self.text}\n\n{self.question}" if self.text else self.question
        return [{"role": "user", "content": content}]


_TEXT = """\
Read this report.

The ferry that links the island of Norrholm to the mainland had served for forty-one years when the harbour office \
decided to replace it. The old boat, the Amalia, carried twelve cars and ninety passengers. She crossed the strait \
eight times a day in summer and four times a day in winter, and she was late so rarely that people on the island set \
their clocks by her horn. Her captain for the last nineteen of those years was Ingrid Solberg, who had first come \
aboard as a deckhand at the age of seventeen.

The new ferry is called the Tern. She runs on batteries and carries thirty cars and two hundred passengers. A \
charging tower at each pier connects to her within half a minute of her arrival and fills her batteries while the \
cars roll on and off. The crossing takes twenty-two minutes, three minutes less than before. In her first winter ice \
blocked the charging tower on the mainland side for two days. The crew solved the problem with hot water from the \
kitchen of the harbour hotel, carried over in milk cans by the whole staff, and the harbour office has since fitted \
the tower with heated joints.

Not everyone was pleased. The fishermen complained that the Tern makes no sound in fog, so the office gave her the \
horn of the Amalia, which had been kept in a shed. The baker, whose bread used to cross on the first boat at six in \
the morning, had to wait until the schedule was changed in spring. The school, on the other hand, gained a good \
deal: children from the mainland can now take part in the sailing course on Wednesdays, and forty-six of them do.

The Amalia was not scrapped. The village bought her for one crown, hauled her onto the beach below the church, and \
turned her into a library. Captain Solberg, who could have retired, became its first librarian. She says that the \
work is much the same as before: people come aboard, they stay for a while, and they leave a little further along \
than they were. The library holds four thousand books, most of them given by the islanders. It is open on every day \
of the week but Monday, and on stormy evenings its lights can be seen from the deck of the Tern halfway across the \
strait."""

PROMPTS = (
    Prompt("What is the capital of France, and what is it known for?", "a short prompt:"),
    Prompt(
        "In the report, what became of the old ferry, and who works there now?", "a report of five paragraphs:", _TEXT
    ),
)
