"""MusicXML to LMX and back: the same notes, judged by music21; written scores load in verovio; nothing lost in silence.

`tests/prove/symbolic.py` does the same over every chorale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import verovio
from hypothesis import given, settings
from hypothesis import strategies as st
from music21 import converter, corpus

from ringweave.tokenizers import lmx
from ringweave.tokenizers.errors import DataError, VocabularyError

CORPUS = Path(corpus.__file__).parent
CHORALES = (
    *("bach/bwv66.6.mxl", "bach/bwv244.15.mxl", "bach/bwv434.mxl", "bach/bwv391.mxl", "bach/bwv411.mxl"),
    *("bach/bwv255.mxl", "bach/bwv346.mxl", "bach/bwv278.mxl", "bach/bwv111.6.mxl", "bach/bwv369.mxl"),
    *("bach/bwv90.5.mxl", "bach/bwv154.3.mxl"),
)
verovio.enableLog(verovio.LOG_OFF)


@pytest.fixture(scope="module")
def judge(load_script: Callable[[Path, str], ModuleType]) -> ModuleType:
    """`notes` and `agree`."""
    return load_script(Path(__file__).parents[1] / "prove" / "_notes.py", "_prove_notes")


def part(*measures: str, number: int = 1) -> str:
    body = "".join(f'<measure number="{i}">{m}</measure>' for i, m in enumerate(measures, 1))
    return f'<part id="P{number}">{body}</part>'


def score(*parts: str) -> bytes:
    names = "".join(
        f'<score-part id="P{i}"><part-name/></score-part>' for i in range(1, len(parts or "1") + 1)
    )
    return f'<score-partwise version="4.0"><part-list>{names}</part-list>{"".join(parts)}</score-partwise>'.encode()


def note(
    pitch: str = "C4", duration: int | None = 4, kind: str = "quarter", more: str = "", **first: str
) -> str:
    """<note>; `more` stands behind the type; pitch "C#4", "rest" or XML."""
    if pitch == "rest":
        head = "<rest/>"
    elif pitch.startswith("<"):
        head = pitch
    else:
        alter = {"#": "<alter>1</alter>", "b": "<alter>-1</alter>"}.get(pitch[1:-1], "")
        head = f"<pitch><step>{pitch[0]}</step>{alter}<octave>{pitch[-1]}</octave></pitch>"
    length = "" if duration is None else f"<duration>{duration}</duration>"
    ties = first.get("ties", "")
    voice = f"<voice>{first['voice']}</voice>" if "voice" in first else ""
    name = f"<type>{kind}</type>" if kind else ""
    return f"<note>{first.get('before', '')}{head}{length}{ties}{voice}{name}{more}</note>"


def head(divisions: int = 4, more: str = "<clef><sign>G</sign><line>2</line></clef>", fifths: int = 0) -> str:
    time = "<time><beats>4</beats><beat-type>4</beat-type></time>"
    key = f"<key><fifths>{fifths}</fifths></key>"
    return f"<attributes><divisions>{divisions}</divisions>{key}{time}{more}</attributes>"


def words(xml: bytes) -> list[str]:
    return lmx.linearize(xml, where="x")[0]


def round_trip(data: bytes, where: str = "x") -> str:
    """The score written again: complete, and the same tokens when read again."""
    ids = lmx.encode(data, where=where)
    assert ids.dtype == np.int32
    xml, complete = lmx.decode(ids)
    assert complete
    assert lmx.to_text(lmx.encode(xml.encode(), where=where)) == lmx.to_text(ids)
    return xml


def same_notes(judge: ModuleType, source: Any, xml: str) -> int:
    before, after = judge.notes(source), judge.notes(converter.parseData(xml, format="musicxml"))
    assert before - after == Counter()
    assert after - before == Counter()
    toolkit = verovio.toolkit()
    assert toolkit.loadData(xml)
    assert toolkit.getPageCount() > 0
    return before.total()


def refused(data: bytes, why: str) -> None:
    with pytest.raises(DataError, match=why) as caught:
        lmx.encode(data, where="shard-0:7")
    assert "shard-0:7" in str(caught.value)


# real scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CHORALES, "schumann_clara/polonaise_op1n2.mxl"])
def test_scores_of_music21_come_back_note_for_note(name: str, judge: ModuleType) -> None:
    path = CORPUS / name
    xml = round_trip(path.read_bytes(), name)
    assert same_notes(judge, converter.parse(path, forceSource=True), xml) > 100


# scores by hand ------------------------------------------------------------------------------------------------

CLEFS = "".join(
    f'<clef number="{i}"><sign>{s}</sign><line>{n}</line></clef>'
    for i, (s, n) in enumerate(["G2", "G2", "F4"], 1)
)
TIE = '<tie type="{0}"/>'
TIED = '<notations><tied type="{0}"/></notations>'


def organ() -> bytes:
    """Three staves, four voices, a chord, a triplet, a grace note, ties over the bar, a clef in the middle."""
    triplet = (
        "<time-modification><actual-notes>3</actual-notes><normal-notes>2</normal-notes></time-modification>"
    )
    beam = '<beam number="1">{0}</beam>'
    one = (
        head(12, f"<staves>3</staves>{CLEFS}", -3)
        + note("B4", None, "eighth", "<staff>1</staff>", before='<grace slash="yes"/>', voice="1")
        + note("C5", 12, "quarter", "<stem>up</stem><staff>1</staff>", voice="1")
        + note("Eb5", 12, "quarter", "<stem>up</stem><staff>1</staff>", voice="1", before="<chord/>")
        + "".join(
            note(
                "F#5",
                4,
                "eighth",
                f"<accidental>sharp</accidental>{triplet}<staff>1</staff>{beam.format(b)}",
                voice="1",
            )
            for b in ("begin", "continue", "end")
        )
        + note(
            "G5", 24, "half", "<staff>1</staff>" + TIED.format("start"), voice="1", ties=TIE.format("start")
        )
        + "<backup><duration>48</duration></backup>"
        + note("rest", 12, "quarter", "<staff>1</staff>", voice="2")
        + note("Ab4", 36, "half", "<dot/><staff>1</staff>", voice="2")
        + "<backup><duration>48</duration></backup>"
        + note("Eb4", 36, "half", "<dot/><staff>2</staff>", voice="5")
        + '<attributes><clef number="2"><sign>F</sign><line>4</line></clef></attributes>'
        + note("C4", 12, "quarter", "<staff>2</staff>", voice="5")
        + "<backup><duration>32</duration></backup>"
        + note("Bb2", 32, "", "<staff>3</staff>", voice="9")
    )
    two = (
        note("G5", 48, "whole", "<staff>1</staff>" + TIED.format("stop"), voice="1", ties=TIE.format("stop"))
        + "<backup><duration>48</duration></backup>"
        + note('<rest measure="yes"/>', 48, "", "<staff>2</staff>", voice="5")
        + "<backup><duration>12</duration></backup><forward><duration>4</duration></forward>"
        + note("C3", 8, "quarter", f"{triplet}<staff>3</staff>", voice="9")
    )
    return score(part(one, two))


def test_three_staves_and_many_voices_by_hand(judge: ModuleType) -> None:
    data = organ()
    xml = round_trip(data)
    assert same_notes(judge, converter.parseData(data.decode(), format="musicxml"), xml) == 15
    tokens = " ".join(words(data))
    assert tokens.startswith(
        "measure key:fifths:-3 time beats:4 beat-type:4 clef:G2 staff:1 clef:G2 staff:2 clef:F4 staff:3 "
        "grace grace:slash B4 voice:1 eighth alter:0 staff:1 C5 quarter stem:up chord E5 quarter "
        "F5 eighth 3in2 sharp beam:begin F5 eighth 3in2 sharp F5 eighth 3in2 sharp beam:end "
        "G5 half tied:start backup whole rest voice:2 quarter staff:1 A4 half dot"
    )
    # 32 of 12 units a quarter is 8/3 quarters: no type lasts that long, so it is told in digits
    assert (
        "backup untyped lasts digit:8 over digit:3 B2 voice:9 untyped lasts digit:8 over digit:3 staff:3"
        in tokens
    )
    assert (
        "backup quarter forward untyped lasts digit:1 over digit:3 C3 voice:9 quarter 3in2 staff:3" in tokens
    )
    root = ElementTree.fromstring(xml)
    assert [e.text for e in root.iter("staves")] == ["3"]
    assert Counter(e.text for e in root.iter("staff")) == {"1": 10, "2": 3, "3": 2}


def test_plain_lmx_of_one_part_by_hand() -> None:
    data = score(
        part(head() + note("F#4", 2, "eighth", "<accidental>sharp</accidental><stem>up</stem>") + note("F#4"))
    )
    want = "measure key:fifths:0 time beats:4 beat-type:4 clef:G2 F4 eighth lasts digit:1 over digit:2 sharp stem:up"
    assert words(data) == f"{want} F4 quarter".replace(" lasts digit:1 over digit:2", "").split()


@pytest.mark.parametrize(
    ("notes", "tokens"),
    [
        # key, measure, barline, tie, octave, staff
        ([("F#4", "", "")], "F4 quarter"),
        ([("F4", "", "")], "F4 quarter alter:0"),
        ([("F4", "natural", ""), ("F4", "", ""), ("F#4", "", "")], "F4 quarter natural F4 quarter F4 quarter alter:1"),
        ([("F4", "natural", ""), ("F#5", "", "")], "F4 quarter natural F5 quarter"),
        ([("C#4", "sharp", "start"), "|", ("C#4", "", "stop"), ("C4", "", "")],
         "C4 quarter sharp tied:start measure C4 quarter tied:stop C4 quarter"),
        ([("C#4", "sharp", ""), "|", ("C4", "", "")], "C4 quarter sharp measure C4 quarter"),
        ([("Cb4", "sharp", "")], "C4 quarter sharp alter:-1"),
    ],
)  # fmt: skip
def test_alterations_follow_the_page_and_are_told_where_they_do_not(notes: list[Any], tokens: str) -> None:
    measures = [""]
    for entry in notes:
        if entry == "|":
            measures.append("")
            continue
        pitch, accidental, tie = entry
        more = f"<accidental>{accidental}</accidental>" if accidental else ""
        more += TIED.format(tie) if tie else ""
        measures[-1] += note(pitch, 4, "quarter", more, ties=TIE.format(tie) if tie else "")
    data = score(part(head(fifths=1) + measures[0], *measures[1:]))
    assert " ".join(words(data)).partition("clef:G2 ")[2] == tokens
    alters = [e.findtext("alter") or "0" for e in ElementTree.fromstring(round_trip(data)).iter("pitch")]
    assert alters == [e.findtext("alter") or "0" for e in ElementTree.fromstring(data).iter("pitch")]


def test_an_accidental_of_a_later_place_does_not_reach_back_over_a_backup() -> None:
    sharp = note("F#4", 4, "quarter", "<accidental>sharp</accidental>", voice="1")
    data = score(
        part(
            head() + note("C4", voice="1") + sharp + "<backup><duration>8</duration></backup>"
            + note("F4", voice="2") + note("F#4", voice="2")
        )
    )  # fmt: skip
    assert not [token for token in words(data) if token.startswith("alter")]


def test_an_accidental_in_a_chord_holds_from_the_start_of_the_chord() -> None:
    sharp = "<accidental>sharp</accidental>"
    data = score(
        part(
            head()
            + note("C4", 8, "half")
            + note("F#4", 8, "half", sharp, before="<chord/>")
            + "<backup><duration>4</duration></backup>"
            + note("F#4")
            + note("G#4", 4, "quarter", sharp)
            + "<backup><duration>8</duration></backup>"
            + note("G4")
            + note("G#4")
        )
    )
    assert not [token for token in words(data) if token.startswith("alter")]
    alters = [e.findtext("alter") or "0" for e in ElementTree.fromstring(round_trip(data)).iter("pitch")]
    assert alters == ["0", "1", "1", "1", "0", "1"]


def durations(xml: str) -> list[Fraction]:
    root = ElementTree.fromstring(xml)
    units = int(root.findtext(".//divisions") or 0)
    return [Fraction(int(e.text or 0), units) for e in root.iter("duration")]


def test_lengths_are_exact_whatever_their_type_says() -> None:
    odd = "<time-modification><actual-notes>125</actual-notes><normal-notes>8</normal-notes></time-modification>"
    fifteen = odd.replace("125", "15")
    data = score(
        part(
            head(1000)
            + note("C4", 333, "eighth")
            + note("C4", 64, "quarter", odd)
            + note("C4", 533, "quarter", fifteen)
            + note("C4", 1750, "", "")
            + note('<rest measure="yes"/>', 3000, "whole")
            + "<backup><duration>77</duration></backup>"
        )
    )
    text = " ".join(words(data))
    assert "C4 eighth lasts digit:3 digit:3 digit:3 over digit:1 digit:0 digit:0 digit:0" in text
    assert "C4 quarter ratio digit:1 digit:2 digit:5 over digit:8" in text
    assert "C4 quarter lasts digit:5 digit:3 digit:3 over digit:1 digit:0 digit:0 digit:0 15in8" in text
    assert "C4 quarter dot dot" in text
    assert "rest rest:measure lasts digit:3" in text
    thousandths = [333, 64, 533, 1750, 3000, 77]
    assert durations(round_trip(data)) == [Fraction(n, 1000) for n in thousandths]


def test_unpitched_cue_hidden_and_transposed_notes_and_odd_times_come_back(judge: ModuleType) -> None:
    drum = "<unpitched><display-step>E</display-step><display-octave>4</display-octave></unpitched>"
    steps = "<diatonic>-1</diatonic><chromatic>-2</chromatic><octave-change>-1</octave-change>"
    transpose = f"<transpose>{steps}</transpose>"
    clef = "<clef><sign>percussion</sign></clef>"
    beats = "<attributes><time><beats>3+2</beats><beat-type>8</beat-type></time></attributes>"
    first = (
        head(4, clef + transpose)
        + note(drum, 4)
        + note("C4", 4).replace("<note>", '<note print-object="no">')
    )
    data = score(part(first + note("E4", 4, before="<cue/>"), beats + note('<rest measure="yes"/>', 10, "")))
    text = " ".join(words(data))
    assert (
        "clef:percussion transpose diatonic:-8 chromatic:-14 unpitched E4 quarter print-object:no C4" in text
    )
    assert text.endswith("cue E4 quarter measure time beats:3 beats:2 beat-type:8 rest rest:measure")
    xml = round_trip(data)
    assert durations(xml) == [1, 1, 1, Fraction(5, 2)]
    same_notes(judge, converter.parseData(data.decode(), format="musicxml"), xml)


def test_what_only_decorates_is_counted_and_no_note_is_among_it() -> None:
    more = "<notehead>x</notehead><notations><technical><fingering>1</fingering></technical></notations>"
    lyric = "<lyric><text>la</text></lyric>"
    extra = '<direction/><harmony/><barline location="right"><repeat direction="backward"/></barline><print/>'
    data = score(part(head() + note("C4", 4, "quarter", more + lyric) + extra))
    tokens, dropped = lmx.linearize(data, where="x")
    names = ["notehead", "notations/technical/fingering", "lyric", "direction", "harmony", "barline", "print"]
    assert dropped == Counter([*names, "part-list"]) == lmx.dropped(data, where="x")
    assert tokens[-2:] == ["C4", "quarter"]


# limits and damage ---------------------------------------------------------------------------------------------


def test_forty_staves_come_back_and_forty_one_are_refused() -> None:
    def staves(count: int) -> bytes:
        clefs = "".join(
            f'<clef number="{i}"><sign>G</sign><line>2</line></clef>' for i in range(1, count + 1)
        )
        notes = "<backup><duration>16</duration></backup>".join(
            note("C4", 16, "whole", f"<staff>{i}</staff>", voice=str(i)) for i in range(1, count + 1)
        )
        return score(part(head(4, f"<staves>{count}</staves>{clefs}") + notes))

    root = ElementTree.fromstring(round_trip(staves(40)))
    assert [e.text for e in root.iter("staff")] == [str(i) for i in range(1, 41)]
    assert root.findtext(".//staves") == "40"
    refused(staves(41), "<staves> is 41, not 1 to 40")
    parts = score(*(part(head() + note("C4", 16, "whole"), number=i) for i in range(1, 41)))
    assert words(parts).count("part") == 39
    assert len(ElementTree.fromstring(round_trip(parts)).findall("part")) == 40


def test_staves_without_a_sign_or_a_note_are_told() -> None:
    data = score(part(head(4, "<staves>3</staves>" + CLEFS[: CLEFS.index('<clef number="3"')]) + note()))
    assert words(data)[:2] == ["measure", "staves:3"]
    assert ElementTree.fromstring(round_trip(data)).findtext(".//staves") == "3"


def test_voices_of_any_name_are_numbered() -> None:
    data = score(part(head() + note(voice="soprano") + note(voice="alto")))
    assert [t for t in words(data) if t.startswith("voice")] == ["voice:1", "voice:2"]
    assert lmx.dropped(data, where="x")["voice (its name)"] == 2
    assert words(score(part(head() + note(voice="9" * 5000))))[-2:] == ["voice:1", "quarter"]
    refused(score(part(head() + "".join(note(voice=f"v{i}") for i in range(65)))), "65 voices")


@pytest.mark.parametrize(
    ("measure", "why"),
    [
        (note(), "before the first <divisions>"),
        (head() + note("H4"), "a pitch 'H4'"),
        (head() + note().replace("<octave>4", "<octave>12"), "a pitch 'C12'"),
        (head() + note().replace("</step>", "</step><alter>9</alter>"), "<alter> is 9"),
        (head() + note().replace("</step>", "</step><alter>1/0</alter>"), "<alter> holds '1/0'"),
        (head() + note("C4", 0), "lasts 0 quarters"),
        (head() + note("C4", -4), "lasts -1 quarters"),
        (head() + note("C4", None, ""), "neither <duration> nor a known <type>"),
        (head() + note("<oops/>"), "without <pitch>"),
        (head() + note(before="<chord/>"), "<chord/> without a note before it"),
        (head() + "<backup><duration>4</duration></backup>", "before the measure"),
        (head() + "<backup/>", "without <duration>"),
        (head(0), "<divisions> is 0"),
        (head(4, "<clef><sign>Q</sign></clef>"), "no token 'clef:Q'"),
        (head(fifths=8), "<fifths> is 8"),
        (head(fifths=int("1" * 4000)), "not a whole number"),
        (head() + note(more="<staff>1            x</staff>"), "not a whole number"),
        ("<attributes><key><key-step>C</key-step></key></attributes>", "without <fifths>"),
        ("<attributes><time><beats>65</beats><beat-type>4</beat-type></time></attributes>", "<beats> is 65"),
        (
            "<attributes><time><beats>4</beats><beat-type>5</beat-type></time></attributes>",
            "no token 'beat-type:5'",
        ),
        (head(1) + note("C4", 1234567, ""), "more than six digits"),
        (head(1) + note("C4", 1) + "<forward><duration>99999</duration></forward>", "of 99999 quarters"),
        (head() + note(more="<dot/>" * 9), "9 dots"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(measure: str, why: str) -> None:
    refused(score(part(measure)), why)


# any tokens ----------------------------------------------------------------------------------------------------

_USUAL = """measure part C4 F5 rest quarter eighth untyped lasts digit:3 over backup forward chord grace 3in2 sharp
tied:start tied:stop beam:begin slur:start tuplet:stop voice:2 staff:2 time beats:3 beat-type:8 clef:F4 key:fifths:2
rest:measure"""
_WORDS = st.lists(
    st.one_of(st.integers(-3, lmx.SIZE + 3), st.sampled_from(lmx.from_text(_USUAL).tolist())), max_size=80
)


@settings(max_examples=150, deadline=None)
@given(_WORDS)
def test_any_ids_give_a_score_that_can_be_read_again(ids: list[int]) -> None:
    xml, complete = lmx.decode(ids)
    root = ElementTree.fromstring(xml)
    assert all(len(p) for p in root.findall("part"))
    assert all(int(e.text or 0) > 0 for e in root.iter("duration"))
    if not complete:
        return
    once = lmx.encode(xml.encode(), where="x")
    again, still = lmx.decode(once)
    assert still
    np.testing.assert_array_equal(lmx.encode(again.encode(), where="x"), once)


def test_tokens_of_a_model_are_read_as_well_as_they_can_be() -> None:
    good = [
        "measure",
        "key:fifths:0",
        "time",
        "beats:4",
        "beat-type:4",
        "clef:G2",
        "C4",
        "quarter",
        "D4",
        "quarter",
    ]
    assert lmx.decode(lmx.from_text(good))[1] is True
    for bad in (
        ["dot", *good],  # nothing before it
        good[:-1],  # a pitch without a length
        good[1:],  # no measure
        [*good, "E4", "chord", "F4", "quarter"],  # two pitches
        [*good, "backup", "long"],  # before the measure
        [*good, "E4", "untyped"],
        [*good, "E4", "quarter", "lasts", "over", "digit:0"],
        ["measure", "chord", "C4", "quarter"],
        [],
    ):
        xml, complete = lmx.decode(lmx.from_text(bad))
        assert complete is False, bad
        assert ElementTree.fromstring(xml).tag == "score-partwise"
    xml, _ = lmx.decode(lmx.from_text(good[1:]))
    assert len(list(ElementTree.fromstring(xml).iter("pitch"))) == 2
    for odd in ([1.5], ["measure"], [10**9], [-1]):
        assert lmx.decode(odd)[1] is False
    huge = ["measure"]
    for n in range(100_003, 100_103, 2):
        huge += ["C4", "untyped", "lasts", "digit:1", "over", *(f"digit:{d}" for d in str(n))]
    xml, complete = lmx.decode(lmx.from_text(huge))
    assert complete is False  # no common unit that a reader can hold
    assert int(ElementTree.fromstring(xml).findtext(".//divisions") or 0) == 10080


# the vocabulary ------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_fixed() -> None:
    assert lmx.SIZE == len(lmx.TOKENS) == len(set(lmx.TOKENS)) == 635
    assert lmx.digest() == DIGEST
    ids = np.arange(lmx.SIZE)
    np.testing.assert_array_equal(lmx.from_text(lmx.to_text(ids)), ids)
    with pytest.raises(VocabularyError, match="no token 'C99'"):
        lmx.from_text("measure C99")
    with pytest.raises(VocabularyError, match="635"):
        lmx.to_text([635])


DIGEST = "ada4441d1fc458876443046d57fd5a23a9d503d123fa1606d9c89ca8c4fa1c9f"
