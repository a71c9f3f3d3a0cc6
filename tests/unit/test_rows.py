"""Reading files of leads: every form that people export, and every way in which a row or a file can be wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.cli.rows import LeadFile, Row, open_rows
from pipeline.cli.session import Refused


def read(content: str | bytes, name: str = "leads.csv", **options: Any) -> LeadFile:
    """The file with this content, opened."""
    content = content.encode() if isinstance(content, str) else content
    given: dict[str, Any] = {"form": None, "encoding": None, "phone_column": None, "key_column": None} | options
    return open_rows(io.BytesIO(content), name, **given)


def leads(content: str | bytes, name: str = "leads.csv", **options: Any) -> list[object]:
    """The leads of a file whose rows are all good."""
    rows = list(read(content, name, **options).rows)
    assert [row.fault for row in rows] == [""] * len(rows)
    return [row.lead for row in rows]


def faults(rows: Sequence[Row]) -> dict[int, str]:
    """The refused rows' reasons by line."""
    return {row.line: row.fault for row in rows if row.fault}


def refusal(content: str | bytes, name: str = "leads.csv", **options: Any) -> str:
    """Why the whole file is refused."""
    with pytest.raises(Refused) as caught:
        list(read(content, name, **options).rows)
    return caught.value.format_message()


ASHA = {"phone": "9999789877", "data": {"customer_name": "Asha"}}


# CSV


def test_columns_beside_the_number_become_the_data():
    found = leads("phone,customer_name,place\n9999789877, Asha ,Pune\n98111 22334,Vikram,\n")

    assert found == [
        {"phone": "9999789877", "data": {"customer_name": "Asha", "place": "Pune"}},
        {"phone": "98111 22334", "data": {"customer_name": "Vikram", "place": ""}},
    ]


def test_a_key_column_becomes_the_key_and_leaves_the_data():
    found = leads("crm_id,phone,customer_name\nA-1,9999789877,Asha\n", key_column="crm_id")

    assert found == [ASHA | {"key": "A-1"}]


def test_an_empty_key_is_refused_where_a_key_column_was_named():
    rows = list(read("phone,id\n9999789877,\n9811122334,7\n", key_column="id").rows)

    assert faults(rows) == {2: "id: empty, but it is the key column"}
    assert rows[1].lead == {"phone": "9811122334", "data": {}, "key": "7"}


@pytest.mark.parametrize("column", ["Phone", "recipientPhoneNumber", "Mobile No.", "phone_number", "MSISDN", "Contact"])
def test_the_phone_column_is_found_under_its_usual_names(column: str):
    assert leads(f"{column},customer_name\n9999789877,Asha\n") == [ASHA]


def test_a_plain_name_of_the_phone_column_wins_over_one_that_may_mean_a_person():
    assert leads("contact,phone\nAsha,9999789877\n") == [{"phone": "9999789877", "data": {"contact": "Asha"}}]


def test_the_phone_column_can_be_named():
    assert leads("WhatsApp,customer_name\n9999789877,Asha\n", phone_column="WhatsApp") == [ASHA]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_bom_tells_the_encoding_and_is_no_part_of_the_header(encoding: str):
    content = "phone,customer_name\n9999789877,आशा\n"
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")

    assert leads(mark + content.encode(encoding)) == [{"phone": "9999789877", "data": {"customer_name": "आशा"}}]


def test_an_encoding_can_be_named_and_its_bom_is_dropped_all_the_same():
    assert leads(b"\xff\xfe" + "phone\n9999789877\n".encode("utf-16-le"), encoding="utf-16-le") == [
        {"phone": "9999789877", "data": {}}
    ]
    assert leads(b"phone,customer_name\n9999789877,Jos\xe9\n", encoding="cp1252") == [
        {"phone": "9999789877", "data": {"customer_name": "José"}}
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_delimiter_and_line_ends_are_found(delimiter: str, end: str):
    rows = [["phone", "customer_name"], ["9999789877", "Asha"]]

    assert leads(end.join(delimiter.join(row) for row in rows) + end) == [ASHA]


def test_the_mark_that_excel_puts_first_names_the_delimiter():
    assert leads("sep=;\nphone;customer_name\n9999789877;Asha\n") == [ASHA]


def test_blank_lines_are_no_rows_and_keep_the_count_of_lines():
    rows = list(read("\nphone,customer_name\n\n9999789877,Asha\n , \n1,2,3\n").rows)

    assert [row.line for row in rows] == [4, 6]
    assert rows[0].lead == ASHA


def test_a_quoted_field_may_hold_delimiters_quotes_and_line_ends():
    found = list(read('phone,note\n9999789877,"a, ""b""\nc"\n9811122334,x\n').rows)

    assert [(row.line, row.lead["data"]["note"]) for row in found] == [(2, 'a, "b"\nc'), (4, "x")]  # type: ignore[index]


def test_a_row_of_another_width_is_refused_with_its_line_and_the_rest_goes_on():
    rows = list(read("phone,customer_name\n9999789877\n9999789877,Asha\n1,2,3\n").rows)

    assert faults(rows) == {2: "1 fields, but the header names 2", 4: "3 fields, but the header names 2"}
    assert rows[1].lead == ASHA
    assert rows[2].source == ["1", "2", "3"]


def test_a_delimiter_at_the_end_of_a_line_is_no_field():
    assert leads("phone,customer_name\n9999789877,Asha,,\n") == [ASHA]


def test_a_quote_that_is_never_closed_costs_its_own_row_and_no_other():
    good = "".join(f"98111{i:05d},Vikram\n" for i in range(1000))

    rows = list(read(f'phone,customer_name\n9999789877,"Asha\n{good}').rows)

    assert faults(rows) == {2: 'not CSV: a quote (") that opens here is never closed'}
    assert [row.line for row in rows[1:]] == list(range(3, 1003))
    assert rows[1000].lead == {"phone": "9811100999", "data": {"customer_name": "Vikram"}}
    assert rows[0].source == ['9999789877,"Asha']


def test_a_quote_that_is_closed_by_another_rows_quote_costs_its_own_row_alone():
    rows = list(read('phone,name\n1,"Asha\n2,Vikram\n3,"Meera, Priya"\n').rows)

    assert faults(rows) == {2: 'not CSV: text follows a closing quote ("); write a quote inside a field twice'}
    assert [row.lead["data"]["name"] for row in rows[1:]] == ["Vikram", "Meera, Priya"]  # type: ignore[index]


def test_an_unclosed_quote_before_megabytes_is_found_without_reading_them_all_as_one_row():
    filler = "9811122334,Vikram\n" * 100_000

    rows = list(read(f'phone,name\n1,"Asha\n{filler}').rows)

    assert faults(rows) == {
        2: 'not CSV: a quote (") that opens here is not closed within 1,048,576 characters',
    }
    assert len(rows) == 100_001


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_line_without_an_end_is_refused_and_the_next_one_is_read(form: str):
    good = {"csv": "9999789877,Asha", "jsonl": json.dumps(ASHA)}[form]
    header = {"csv": "phone,customer_name\n", "jsonl": ""}[form]

    rows = list(read(f"{header}{good}\n{'9' * 3_000_000}\n{good}\n", form=form).rows)

    assert [bool(row.fault) for row in rows] == [False, True, False]
    assert rows[1].fault.endswith("longer than 1,048,576 characters")
    assert len(rows[1].source[0]) == 2000
    assert rows[2].lead == ASHA
    assert rows[2].line == rows[1].line + 1


def test_bytes_of_another_encoding_further_down_cost_their_row_and_no_other():
    good = b"9999789877,Asha\n" * 10_000  # more than the part of a file that is looked at before

    rows = list(read(b"phone,customer_name\n" + good + b"9811122334,Jos\xe9\n9999789877,Asha\n").rows)

    assert faults(rows) == {10_002: "not CSV: not utf-8 text; if others are so too, name the encoding"}
    assert len(rows) == 10_002
    assert rows[-1].lead == ASHA


def test_utf_16_that_breaks_further_down_ends_the_file_with_its_reason():
    content = ("phone,customer_name\n" + "9999789877,Asha\n" * 5000).encode("utf-16") + b"\x00\xd8\x00\x00"
    opened = read(content)

    rows = []
    with pytest.raises(Refused) as caught:
        rows.extend(opened.rows)

    assert caught.value.format_message().startswith("leads.csv is not utf-16 text from some place on (")


def test_a_file_of_refused_rows_can_be_mended_and_handed_in_again():
    opened = read("line,reason,phone,customer_name\n7,phone: missing,9999789877,Asha\n", key_column=None)

    assert [row.lead for row in opened.rows] == [ASHA]
    assert list(opened.columns) == ["phone", "customer_name"]
    assert list(opened.notes) == ["this is a file of refused rows: its columns line and reason are left out"]


def test_a_column_without_a_name_is_left_out_and_said_so():
    opened = read("phone,,customer_name\n9999789877,x,Asha\n")

    assert list(opened.notes) == ["columns without a name are left out: the 2. of 3"]
    assert [row.lead for row in opened.rows] == [ASHA]


def test_a_column_named_as_futworks_own_id_is_remarked_on():
    assert "leadId" in next(iter(read("phone,leadId\n9999789877,7\n").notes))
    assert list(read("phone,leadId\n9999789877,7\n", key_column="leadId").notes) == []


# JSON lines


def test_a_json_row_is_a_lead_as_it_stands():
    row = {"phone": "9999789877", "data": {"n": {"deep": [1, 2.5, None, True]}}, "key": "k"}

    assert leads(json.dumps(row) + "\n", "leads.jsonl") == [row]


def test_futworks_own_names_are_understood():
    row = {"recipientPhoneNumber": "9999789877", "recipientData": {"customer_name": "Asha"}}

    assert leads(json.dumps(row), "leads.ndjson") == [ASHA]


def test_a_flat_json_row_has_its_other_fields_as_data():
    row = {"mobile": 9999789877, "customer_name": "Asha", "crm": 7}

    assert leads(json.dumps(row), "x.jsonl", key_column="crm") == [
        {"phone": 9999789877, "key": 7, "data": {"customer_name": "Asha"}}
    ]
    assert leads(json.dumps(row), "x.jsonl", phone_column="crm") == [
        {"phone": 7, "data": {"mobile": 9999789877, "customer_name": "Asha"}}
    ]


def test_a_field_beside_the_data_is_kept_so_that_it_is_refused_rather_than_lost():
    row = {"phone": "9999789877", "data": {"a": 1}, "extra": 2}

    assert leads(json.dumps(row), "x.jsonl", phone_column="phone") == [row]


def test_a_json_row_with_a_number_alone_has_no_data():
    assert leads('{"phone": "9999789877"}\n', "x.jsonl") == [{"phone": "9999789877"}]


def test_json_rows_that_are_none_are_refused_by_line_and_the_rest_goes_on():
    good = json.dumps(ASHA)
    content = f'{good}\n\n[1]\n"text"\n{{"phone": NaN, "data": {{}}}}\n{{"phone"\nnull\n{good}\n'

    rows = list(read(content, "x.jsonl").rows)

    found = faults(rows)
    assert list(found) == [3, 4, 5, 6, 7]
    assert (found[3], found[4], found[7]) == ("not a JSON object",) * 3
    assert found[5].startswith("not JSON: ")
    assert found[5].endswith("; NaN and Infinity are no JSON")
    assert found[6].startswith("not JSON: unexpected end of data")
    assert [row.lead for row in rows if not row.fault] == [ASHA, ASHA]


@pytest.mark.parametrize("value", [{}, {"id": None}, {"id": ""}])
def test_a_json_row_without_the_key_that_was_named_is_refused(value: dict[str, object]):
    rows = list(read(json.dumps({"phone": "9999789877", "a": 1} | value), "x.jsonl", key_column="id").rows)

    assert faults(rows) == {1: "id: missing, but it is the key"}


def test_json_lines_are_told_by_their_look_where_the_name_does_not_tell():
    assert leads("\ufeff  " + json.dumps(ASHA), "stdin") == [ASHA]


# What is no file of leads


@pytest.mark.parametrize("content", [b"", b"\n\n  \r\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff\xfe\n\x00\n\x00"])
def test_an_empty_file_is_refused(content: bytes):
    assert refusal(content) == "leads.csv is empty: there is nothing to enqueue"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04rest", "leads.csv is an Excel workbook or a ZIP archive: save its sheet as CSV (UTF-8)"),
        (b"\x1f\x8brest", "leads.csv is compressed: use `zcat FILE | pipeline enqueue - …`"),
        (b"%PDF-1.7", "leads.csv is a PDF: give CSV or JSON lines"),
        (
            b"a\x00b\x01\x02\n",
            "leads.csv is no text: give CSV or JSON lines (for UTF-16 without a mark, --encoding utf-16-le)",
        ),
        (
            b"phone,name\n9999789877,Jos\xe9\n",
            "leads.csv is not utf-8 text: name its encoding, such as --encoding cp1252",
        ),
        (b"phone,a,a\n", "leads.csv has two columns named 'a': rename one"),
        (b'"phone\n9999789877\n', "leads.csv is not CSV: its header cannot be read (unexpected end of data)"),
        (
            b"name,place\nAsha,Pune\n",
            "leads.csv has no phone column; name one of its columns with --phone-column: name, place",
        ),
    ],
)
def test_what_is_no_file_of_leads_is_refused_with_what_to_do(content: bytes, reason: str):
    assert refusal(content) == reason


def test_a_json_array_is_refused_with_the_way_to_make_lines_of_it():
    assert refusal('[{"phone": "9999789877"}]', "leads.json").startswith("leads.json is one JSON array: ")


@pytest.mark.parametrize("option", ["phone_column", "key_column"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(option: str):
    reason = refusal("phone,name\n9999789877,Asha\n", **{option: "Mobile"})

    assert reason == f"leads.csv has no column 'Mobile' (--{option.replace('_', '-')}); it has: phone, name"


@pytest.mark.parametrize("encoding", ["klingon", "base64"])
def test_an_unknown_encoding_is_refused(encoding: str):
    assert refusal("phone\n1\n", encoding=encoding) == f"--encoding: {encoding} is not the name of a text encoding"


def test_the_position_counts_the_bytes_for_the_progress_bar():
    content = "phone\n" + "9999789877\n" * 50_000
    opened = read(content)

    assert len(list(opened.rows)) == 50_000
    assert opened.position() == len(content)
