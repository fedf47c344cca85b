/* Inline caches for attributes and methods in modules that Cython compiled.

The interpreter of CPython 3.11 remembers at each LOAD_ATTR and LOAD_METHOD where it found the name last; C that Cython
writes looks it up anew each time, in the type, its bases and the instance. Here each place in the C remembers, by the
same rules: a type's tp_version_tag is its own and becomes another (or 0) when the type or a base changes, so an equal
tag means the same type with the same attributes. Where anything is not as remembered, the C API answers, as without.

`compiler.py` puts this file before the C of a module and has it call the macros at the end. Other versions of CPython
lay their instances out differently: there the macros are the calls they stand for.
*/
#ifndef STEP_ORACLE_ATTRIBUTE_CACHE_H
#define STEP_ORACLE_ATTRIBUTE_CACHE_H

#define PY_SSIZE_T_CLEAN
#include "Python.h"

#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030C0000 && defined(__GNUC__)

#include "structmember.h"
/* Of the internal headers this one alone goes with Python.h; layout of instances: pycore_object.h of 3.11. */
#define Py_BUILD_CORE
#include "internal/pycore_dict.h"
#undef Py_BUILD_CORE

static inline PyDictValues *so_values(PyObject *object) { return ((PyDictValues **)object)[-4]; }
static inline PyObject *so_dictionary(PyObject *object) { return ((PyObject **)object)[-3]; }

enum so_kind {
    SO_UNKNOWN = 0,
    /* In the instance; a data descriptor of that name the type has not. */
    SO_INSTANCE,
    /* In the type, and no instance has a dictionary. */
    SO_TYPE,
    /* In the type, and instances have dictionaries; this one lacks the name as long as it has so many keys. */
    SO_TYPE_SHADOWABLE,
    /* An object in a slot of the instance, as `__slots__` makes them. */
    SO_SLOT,
    /* A data descriptor in the type. */
    SO_DESCRIPTOR,
};

/* 32 bytes: there are a thousand of them in a module, and they are read at every step. */
typedef struct {
    unsigned int version;
    int kind;
    /* The attribute of the type; the type holds the reference as long as its version lasts. */
    PyObject *found;
    /* SO_INSTANCE: in the values of an instance, and in its dictionary once it has one. SO_SLOT: bytes. */
    int index, hint;
    /* SO_TYPE_SHADOWABLE: of the keys that all instances share. Keys are added to them, never taken away. */
    int shared_keys;
    int fills;
} so_cache;

/* A place that sees ever other types is given up after so many. */
#define SO_MOST_FILLS 4096
/* Keys looked through for a name. */
#define SO_MOST_KEYS 1024

/* Index of an interned name; -1 where it is not, -2 where an equal name that is another object may be. */
static inline int so_index(PyDictKeysObject *keys, PyObject *name) {
    if (keys->dk_kind == DICT_KEYS_GENERAL)
        return -2;
    PyDictUnicodeEntry *entries = DK_UNICODE_ENTRIES(keys);
    int doubt = 0;
    for (int i = 0; i < keys->dk_nentries && i < SO_MOST_KEYS; i++) {
        PyObject *key = entries[i].me_key;
        if (key == name)
            return i;
        doubt |= key != NULL && !PyUnicode_CHECK_INTERNED(key);
    }
    return doubt || keys->dk_nentries > SO_MOST_KEYS ? -2 : -1;
}

static inline PyDictKeysObject *so_shared_keys(PyTypeObject *type) {
    return ((PyHeapTypeObject *)type)->ht_cached_keys;
}

static void so_fill(so_cache *cache, PyObject *object, PyObject *name) {
    PyTypeObject *type = Py_TYPE(object);
    cache->kind = SO_UNKNOWN;
    if (cache->fills >= SO_MOST_FILLS || type->tp_getattro != PyObject_GenericGetAttr || !PyUnicode_CheckExact(name) ||
        !PyUnicode_CHECK_INTERNED(name))
        return;
    cache->fills++;
    PyObject *found = _PyType_Lookup(type, name);
    if (!PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG) || type->tp_version_tag == 0)
        return;
    cache->version = type->tp_version_tag;
    cache->found = found;
    if (found != NULL && Py_TYPE(found)->tp_descr_get != NULL && Py_TYPE(found)->tp_descr_set != NULL) {
        cache->kind = SO_DESCRIPTOR;
        if (Py_IS_TYPE(found, &PyMemberDescr_Type)) {
            PyMemberDef *member = ((PyMemberDescrObject *)found)->d_member;
            if (member->type == T_OBJECT_EX && !(member->flags & PY_AUDIT_READ) &&
                PyType_IsSubtype(type, PyDescr_TYPE(found))) {
                cache->kind = SO_SLOT;
                cache->index = (int)member->offset;
            }
        }
        return;
    }
    if (PyType_HasFeature(type, Py_TPFLAGS_MANAGED_DICT)) {
        PyDictKeysObject *keys = so_shared_keys(type);
        PyDictObject *dictionary = (PyDictObject *)so_dictionary(object);
        if (keys == NULL)
            return;
        int index = so_index(keys, name);
        int hint = dictionary != NULL ? so_index(dictionary->ma_keys, name) : index;
        if (index == -2 || hint == -2)
            return;
        if (index >= 0 || hint >= 0) {
            cache->kind = SO_INSTANCE;
            cache->index = index;
            cache->hint = hint;
        } else if (found != NULL) {
            cache->kind = SO_TYPE_SHADOWABLE;
            cache->shared_keys = (int)keys->dk_nentries;
        }
    } else if (type->tp_dictoffset == 0 && found != NULL) {
        cache->kind = SO_TYPE;
    }
}

/* A new reference, or NULL without an exception where the cache does not know. */
static inline PyObject *so_instance_value(so_cache *cache, PyObject *object, PyObject *name) {
    PyObject *value = NULL;
    PyDictValues *values = so_values(object);
    if (values != NULL) {
        if (cache->index < 0)
            return NULL;
        value = values->values[cache->index];
    } else {
        PyDictObject *dictionary = (PyDictObject *)so_dictionary(object);
        if (dictionary == NULL)
            return NULL;
        PyDictKeysObject *keys = dictionary->ma_keys;
        size_t hint = (size_t)cache->hint;
        if (hint >= (size_t)keys->dk_nentries || keys->dk_kind == DICT_KEYS_GENERAL)
            return NULL;
        PyDictUnicodeEntry *entry = DK_UNICODE_ENTRIES(keys) + hint;
        if (entry->me_key != name)
            return NULL;
        value = dictionary->ma_values != NULL ? dictionary->ma_values->values[hint] : entry->me_value;
    }
    Py_XINCREF(value);
    return value;
}

/* The type's attribute is this instance's, too; -1 with an exception. */
static inline int so_not_shadowed(so_cache *cache, PyObject *object, PyObject *name) {
    if (cache->kind == SO_TYPE)
        return 1;
    if (so_values(object) != NULL)
        return so_shared_keys(Py_TYPE(object))->dk_nentries == cache->shared_keys;
    PyObject *dictionary = so_dictionary(object);
    if (dictionary == NULL)
        return 0;
    if (_PyDict_GetItem_KnownHash(dictionary, name, ((PyASCIIObject *)name)->hash) != NULL)
        return 0;
    return PyErr_Occurred() ? -1 : 1;
}

static inline PyObject *so_get_attribute(PyObject *object, PyObject *name, so_cache *cache) {
    PyTypeObject *type = Py_TYPE(object);
    if (__builtin_expect(cache->version == type->tp_version_tag, 1)) {
        PyObject *value = NULL, *found = cache->found;
        switch (cache->kind) {
        case SO_INSTANCE:
            value = so_instance_value(cache, object, name);
            if (value != NULL)
                return value;
            break;
        case SO_SLOT:
            value = *(PyObject **)((char *)object + cache->index);
            if (value != NULL)
                return Py_NewRef(value);
            break;
        case SO_TYPE:
        case SO_TYPE_SHADOWABLE: {
            int ours = so_not_shadowed(cache, object, name);
            if (ours < 0)
                return NULL;
            if (!ours)
                break;
        }
        /* fall through */
        case SO_DESCRIPTOR: {
            descrgetfunc get = Py_TYPE(found)->tp_descr_get;
            Py_INCREF(found);
            if (get == NULL)
                return found;
            value = get(found, object, (PyObject *)type);
            Py_DECREF(found);
            /* AttributeError of a property is for __getattr__, which a type with PyObject_GenericGetAttr lacks. */
            return value;
        }
        default:
            break;
        }
    }
    PyObject *answer = PyObject_GetAttr(object, name);
    if (answer != NULL)
        so_fill(cache, object, name);
    return answer;
}

static inline PyObject *so_call_method(PyObject *name, PyObject *const *arguments, size_t count, so_cache *cache) {
    PyObject *object = arguments[0];
    if (__builtin_expect(cache->version == Py_TYPE(object)->tp_version_tag, 1)) {
        PyObject *method = cache->found;
        if (cache->kind == SO_TYPE || cache->kind == SO_TYPE_SHADOWABLE) {
            int ours = so_not_shadowed(cache, object, name);
            if (ours < 0)
                return NULL;
            if (ours && PyType_HasFeature(Py_TYPE(method), Py_TPFLAGS_METHOD_DESCRIPTOR)) {
                Py_INCREF(method);
                /* What lies before `arguments` is not the callee's to write to: it is not what the caller left there. */
                PyObject *answer =
                    PyObject_Vectorcall(method, arguments, count & ~PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
                Py_DECREF(method);
                return answer;
            }
        }
    }
    /* `object` may die in the call. */
    Py_INCREF(object);
    PyObject *answer = PyObject_VectorcallMethod(name, arguments, count, NULL);
    if (answer != NULL)
        so_fill(cache, object, name);
    Py_DECREF(object);
    return answer;
}

#define STEP_ORACLE_GET_ATTRIBUTE(object, name) \
    __extension__({ static so_cache so_here; so_get_attribute((object), (name), &so_here); })
#define STEP_ORACLE_CALL_METHOD(name, arguments, count) \
    __extension__({ static so_cache so_here; so_call_method((name), (arguments), (count), &so_here); })

#else

#define STEP_ORACLE_GET_ATTRIBUTE(object, name) PyObject_GetAttr((object), (name))
#define STEP_ORACLE_CALL_METHOD(name, arguments, count) PyObject_VectorcallMethod((name), (arguments), (count), NULL)

#endif
#endif
